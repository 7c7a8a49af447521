# SPDX-License-Identifier: GPL-2.0-or-later
"""What roles run as root is what the controller gave, whoever else is on the host.

Run by Ansible itself, with its connection 'local', in a mount namespace where what is written to
the host's folders goes to memory, and goes when it ends.
"""

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_BIN = Path(sys.executable).parent

# A host of its own, as far as files go; $1 is a folder for what is written.
_SANDBOX = """set -eu
mount -t tmpfs memory "$1"
for each in etc opt usr/local var; do
    mkdir -p "$1/$each/new" "$1/$each/work"
    mount -t overlay over -o "lowerdir=/$each,upperdir=$1/$each/new,workdir=$1/$each/work" "/$each"
done
shift
exec "$@"
"""

Sandbox = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    """Run a shell script where it may change the host's folders; $1 and so on are arguments."""
    memory = tmp_path / "memory"
    memory.mkdir()

    def run(script: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            ["unshare", "--mount", "sh", "-c", _SANDBOX, "sh", memory, "sh", "-c", script, "sh",
             *map(str, arguments)], capture_output=True, text=True, check=False, cwd=_ROOT,
            env={**os.environ, "LC_ALL": "C.UTF-8", "PATH": f"{_BIN}:{os.environ['PATH']}"},
            timeout=300)
    return run


def _package(folder: Path, says: str) -> Path:
    """A package named as a kernel's, whose script, run by root, writes what it is."""
    tree = folder / says / "tree"  # apart from the package, or that would hold itself
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN/control").write_text(
        "Package: linux-image-6.99.0-detour-test\nVersion: 6.99.0-deadbeef\n"
        "Architecture: all\nMaintainer: Nobody <nobody@example.net>\nDescription: test\n")
    script = tree / "DEBIAN/postinst"
    script.write_text(f"#!/bin/sh\necho {says} >>/var/lib/installed\n")
    script.chmod(0o755)
    package = folder / says / "linux-image-6.99.0-detour-test_6.99.0-deadbeef_amd64.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "--build", tree, package], check=True,
                   capture_output=True)
    return package


# A user has put the name there before, wherever everybody may, and swaps what comes.
_ATTACK = """
name=$(basename "$1")
install -m 644 "$2" /var/evil.deb
for folder in /var/tmp /var/cache /var/cache/detour-tools-kernel; do
    setpriv --reuid 65534 --clear-groups sh -c '
        touch "$1/$2" 2>/dev/null || exit 0
        while :; do
            ! [ -s "$1/$2" ] || cmp -s "$1/$2" /var/evil.deb || {
                cp /var/evil.deb "$1/.new" && mv -f "$1/.new" "$1/$2"; }
        done' sh "$folder" "$name" 2>/dev/null &
    pids="${pids:-} $!"
done
shift 2
status=0
"$@" || status=$?
kill $pids 2>/dev/null || true
cat /var/lib/installed 2>/dev/null || echo nothing
ls -d /var/cache/detour-tools-kernel 2>/dev/null || true
exit $status
"""


def _play(folder: Path, package: Path) -> Path:
    path = folder / "play.yml"
    path.write_text(json.dumps([{
        "hosts": "localhost", "gather_facts": False, "connection": "local",
        "tasks": [{"include_role": {"name": "mptcp_kernel", "tasks_from": "install.yml"}}],
        "vars": {"mptcp_kernel_packages": [str(package)],
                 "ansible_python_interpreter": "/usr/bin/python3",
                 "ansible_facts": {"distribution": "Debian", "distribution_version": "12"},
                 "mptcp_kernel_looked": {"stdout": json.dumps(
                     {"release": "", "others": [], "packages": {}, "menu": {}})}}}]))
    return path


def test_a_package_that_a_user_swaps_is_not_the_one_that_root_installs(
        sandbox: Sandbox, tmp_path: Path) -> None:
    good, evil = _package(tmp_path, "good"), _package(tmp_path, "evil")
    done = sandbox(_ATTACK, good, evil, "ansible-playbook", _play(tmp_path, good))
    assert done.stdout.splitlines()[-1] == "good", done.stdout + done.stderr


def test_a_package_that_came_otherwise_than_it_went_is_not_installed(
        sandbox: Sandbox, tmp_path: Path) -> None:
    good = _package(tmp_path, "good")
    wrong = {"mptcp_kernel_sums": f"{hashlib.sha256(b'').hexdigest()}  {good.name}\n"}
    done = sandbox(_ATTACK, good, good, "ansible-playbook", _play(tmp_path, good),
                   "--extra-vars", json.dumps(wrong))
    assert done.returncode != 0
    assert f"is not what was built or given ({good.name}: FAILED)" in " ".join(
        done.stdout.split()), done.stdout
    assert done.stdout.splitlines()[-1] == "nothing"


# The programs' wheels

def _wheel(folder: Path, says: str) -> None:
    """A wheel of ours, as far as pip looks, whose programs write what they are."""
    with zipfile.ZipFile(folder / "detour_tools-9.9-py3-none-any.whl", "w") as wheel:
        wheel.writestr("fake.py", f"def main():\n    open('/var/ran', 'a').write('{says} ')\n")
        info = "detour_tools-9.9.dist-info"
        wheel.writestr(f"{info}/METADATA",
                       "Metadata-Version: 2.1\nName: detour-tools\nVersion: 9.9\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n"
                                        "Tag: py3-none-any\n")
        wheel.writestr(f"{info}/entry_points.txt", "[console_scripts]\n" + "".join(
            f"detour-{name} = fake:main\n" for name in ("client", "server")))
        wheel.writestr(f"{info}/RECORD", "")


def _archive(folder: Path, says: str) -> dict[str, str]:
    """What scripts/wheels makes of such a wheel and Debian's own pip."""
    wheels = folder / says
    wheels.mkdir()
    _wheel(wheels, says)
    pip = max(Path("/usr/share/python-wheels").glob("pip-*.whl"))  # python3-venv has it
    (wheels / pip.name).write_bytes(pip.read_bytes())
    done = subprocess.run([_ROOT / "scripts/wheels", "--wheels", wheels], check=True, text=True,
                          capture_output=True, env={**os.environ, "XDG_CACHE_HOME": str(folder)})
    found: dict[str, str] = json.loads(done.stdout)
    return found


_INSTALL = """
mkdir -p /opt/detour-tools/wheels && cp "$1" /opt/detour-tools/wheels/it.zip
umask 077
/usr/bin/python3 roles/detour_common/files/install.py /opt/detour-tools/wheels/it.zip r1 "$2" 2>&1
cat /var/ran 2>/dev/null || echo nothing
"""


def test_an_archive_installs_offline(sandbox: Sandbox, tmp_path: Path) -> None:
    made = _archive(tmp_path, "good")
    assert sandbox(_INSTALL, made["archive"], made["sha256"]).stdout == "good good "


def test_another_archive_than_the_controllers_is_not_installed(
        sandbox: Sandbox, tmp_path: Path) -> None:
    good, evil = _archive(tmp_path, "good"), _archive(tmp_path, "evil")
    said = sandbox(_INSTALL, evil["archive"], good["sha256"]).stdout.splitlines()
    assert said[-1] == "nothing", said
    assert "it.zip is not what the controller sent" in said[0]
    assert len(said) == 2


def test_a_wheel_that_the_requirements_do_not_name_is_not_installed(
        sandbox: Sandbox, tmp_path: Path) -> None:
    good, evil = _archive(tmp_path, "good"), _archive(tmp_path, "evil")
    mixed = tmp_path / "mixed.zip"
    with zipfile.ZipFile(mixed, "w") as target, zipfile.ZipFile(good["archive"]) as names, \
            zipfile.ZipFile(evil["archive"]) as wheels:
        for name in wheels.namelist():
            source = names if name == "requirements.txt" else wheels
            target.writestr(name, source.read(name))
    said = sandbox(_INSTALL, mixed, hashlib.sha256(mixed.read_bytes()).hexdigest()).stdout
    assert said.splitlines()[-1] == "nothing", said
    assert len(said.splitlines()) == 2


_FULL = """
mount -t tmpfs -o {options} none /opt
mkdir -p /opt/detour-tools/wheels && cp "$1" /opt/detour-tools/wheels/it.zip
/usr/bin/python3 roles/detour_common/files/install.py /opt/detour-tools/wheels/it.zip r1 "$2" 2>&1
ls -A /opt/detour-tools
"""


@pytest.mark.parametrize(("options", "said"), [
    ("noexec", "/opt/detour-tools must not be on a file system that is mounted noexec"),
    ("size=3m", "No space left on device"),
])
def test_where_a_release_has_no_place_nothing_of_it_is_left(
        sandbox: Sandbox, tmp_path: Path, options: str, said: str) -> None:
    made = _archive(tmp_path, "good")
    lines = sandbox(_FULL.format(options=options), made["archive"], made["sha256"]
                    ).stdout.splitlines()
    assert len(lines) == 2, lines
    assert said in lines[0]
    assert lines[1] == "wheels"


# The archive is in what that hides.
_NO_TMP = """
exec 3<"$1"
mount -t tmpfs -o size=4k,mode=1777 none /tmp
mkdir -p /opt/detour-tools/wheels && cat <&3 >/opt/detour-tools/wheels/it.zip
/usr/bin/python3 roles/detour_common/files/install.py /opt/detour-tools/wheels/it.zip r1 "$2" 2>&1
cat /var/ran
"""


def test_a_full_tmp_is_no_hindrance(sandbox: Sandbox, tmp_path: Path) -> None:
    made = _archive(tmp_path, "good")
    assert sandbox(_NO_TMP, made["archive"], made["sha256"]).stdout == "good good "


_TWICE = """
mkdir -p /opt/detour-tools/wheels && cp "$1" /opt/detour-tools/wheels/it.zip
for each in 1 2 3; do
    /usr/bin/python3 roles/detour_common/files/install.py \\
        /opt/detour-tools/wheels/it.zip r1 "$2" 2>&1 && echo done &
done
wait
cat /var/ran
"""


def test_runs_at_once_install_once(sandbox: Sandbox, tmp_path: Path) -> None:
    made = _archive(tmp_path, "good")
    assert sandbox(_TWICE, made["archive"], made["sha256"]).stdout.split() == [
        "done", "done", "done", "good", "good"]
