# SPDX-License-Identifier: GPL-2.0-or-later
"""What garbage collections go through."""

import gc

from detour_tools.server.garbage import no_collections


def test_what_is_to_stay_is_old_at_once() -> None:
    with no_collections():
        made = [[number] for number in range(1000)]
    ours = {id(each) for each in made}
    young = {id(each) for generation in (0, 1) for each in gc.get_objects(generation)}
    assert not ours & young
    assert gc.isenabled()
