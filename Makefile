# SPDX-License-Identifier: GPL-2.0-or-later
# 'make help' lists the targets.

# Root must leave no files of its own in a user's tree.
SUDO := $(if $(filter 0,$(shell id -u)),,sudo PYTHONDONTWRITEBYTECODE=1 HYPOTHESIS_STORAGE_DIRECTORY=/run/detour-tools-hypothesis $(if $(XDG_CACHE_HOME),XDG_CACHE_HOME=$(XDG_CACHE_HOME)))
BIN  := .venv/bin
VM_TESTS := tests/vm
# Ansible insists.
UTF8 := LC_ALL=C.UTF-8
SCENARIO :=
# Python programs outside src and tests, which the checkers do not find by themselves.
PROGRAMS := scripts/calls scripts/check-setup scripts/role-docs scripts/wheels molecule/default/files/new_run molecule/default/files/transfer \
	roles/detour_common/files/install.py roles/capture/files/detour-capture \
	roles/mptcp_kernel/files/look roles/bridge/library/detour_bridges.py \
	roles/supported/library/detour_close.py roles/supported/library/detour_due.py roles/supported/library/detour_sysctls.py roles/supported/filter_plugins/detour_variables.py \
	roles/mptcp/filter_plugins/detour_mptcp.py
KERNEL_SCRIPTS := kernel/build kernel/check kernel/export kernel/import kernel/selftests
# Also for root by 'su', and for a user: some programs of ours are where only root's PATH leads.
export PATH := $(PATH):/usr/local/sbin:/usr/sbin:/sbin
.DEFAULT_GOAL := help
.PHONY: help venv demo walkthrough test lint kernel test-vm test-vm-debug bench molecule \
	check-setup

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: ## install what is needed: distribution packages, and .venv with the console scripts
	@scripts/setup

demo: venv ## run the main job on an emulated network; pictures and captures land in demo/
	@$(SUDO) $(BIN)/detour-lab demo --output demo

walkthrough: kernel ## the path manager in the kernel, live, with a client in a VM; captures land in walkthrough/
	@scripts/setup vm
	@$(SUDO) $(BIN)/detour-lab walkthrough --output walkthrough

test: venv ## run the unit tests and the tests on network namespaces
	@$(SUDO) $(BIN)/pytest --numprocesses 3 $(if $(SUDO),-p no:cacheprovider)

lint: venv ## ruff, mypy --strict, ansible-lint, yamllint; roles' documents and defaults
	@$(BIN)/ruff check src tests kernel $(KERNEL_SCRIPTS) roles $(PROGRAMS)
	@$(BIN)/mypy
	@MYPYPATH=tests/typing $(BIN)/mypy --no-error-summary --scripts-are-modules -- $(PROGRAMS)
	@MYPYPATH=tests/typing $(BIN)/mypy -p ansible.module_utils.detour_bridging
	@MYPYPATH=kernel $(BIN)/mypy -p detour_kernel
	@$(BIN)/python scripts/role-docs --check
	@$(BIN)/yamllint --strict .
	@. $(BIN)/activate && $(UTF8) ansible-lint --nocolor -q

kernel: ## build a kernel for VMs, with Debian packages, or find it in the cache
	@scripts/setup kernel
	@kernel/build

test-vm: kernel ## run the tests that boot this kernel in virtual machines
	@scripts/setup vm selftests
	@$(SUDO) $(BIN)/pytest $(if $(SUDO),-p no:cacheprovider) $(VM_TESTS)

test-vm-debug: ## run the tests of the kernel on one that watches itself; it takes half an hour to build
	@scripts/setup kernel vm selftests
	@kernel/build --config debug
	@$(SUDO) $(BIN)/pytest $(if $(SUDO),-p no:cacheprovider) tests/vm/test_kernel.py tests/vm/test_kernel_stress.py --kernel debug --vm-memory 3072

bench: ## run the benchmarks, each against its baseline; results land in bench-results/
	@scripts/setup bench vm
	@$(SUDO) $(BIN)/python -m tests.bench --output bench-results

molecule: ## deploy on virtual machines, and verify there; SCENARIO=default or roles, else all
	@scripts/setup kernel molecule
	@scripts/image >/dev/null
	@. $(BIN)/activate && $(UTF8) molecule test $(if $(SCENARIO),--scenario-name $(SCENARIO),--all)

check-setup: ## see on Debians that never saw the project that each target sets up what it runs; minutes
	@scripts/setup check
	@$(SUDO) $(BIN)/python scripts/check-setup
