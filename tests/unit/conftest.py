# SPDX-License-Identifier: GPL-2.0-or-later
"""As Ansible does: what a role's module imports from ansible.module_utils may be the role's."""

from pathlib import Path

import ansible.module_utils

ansible.module_utils.__path__ += [
    str(path) for path in sorted((Path(__file__).parents[2] / "roles").glob("*/module_utils"))]
