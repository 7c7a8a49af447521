# SPDX-License-Identifier: GPL-2.0-or-later
"""What kernel/build, import, export and check share. Standard library only: no .venv is needed."""
