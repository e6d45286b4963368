"""What forward does not want yet, and what backward has freed and will not want again."""

from wanlora.memory.refilling import FreedMemory, passing_bytes


def test_what_passes_fits_all_the_way_while_what_is_kept_comes_to_be() -> None:
    need, at_work, blocks = 1000, 400, 40
    passing = passing_bytes(need)
    assert passing == 600
    for share in range(blocks + 1):
        kept, left = (need - at_work) * share / blocks, passing * (1 - share / blocks)
        assert kept + left + at_work <= need


def test_all_but_the_largest_piece_is_to_spare() -> None:
    held = [100]
    freed = FreedMemory(lambda: held[0])
    held[0] = 40
    assert freed.spare() == 0  # of a pass whose beginning was not seen
    held[0] = 100
    freed.begin()
    found = []
    for now in (90, 80, 50, 45, 60, 40):
        held[0] = now
        found.append(freed.spare())
    assert found == [0, 10, 20, 25, 10, 30]


def test_what_has_been_taken_is_no_longer_there_and_no_piece() -> None:
    held = [100]
    freed = FreedMemory(lambda: held[0])
    freed.begin()
    held[0] = 70
    assert freed.spare() == 0
    held[0] = 40
    assert freed.spare() == 30
    held[0] += 25
    freed.take(25)
    assert freed.spare() == 5
    held[0] -= 30
    assert freed.spare() == 35


def test_the_next_pass_begins_anew() -> None:
    held = [100]
    freed = FreedMemory(lambda: held[0])
    freed.begin()
    held[0] = 20
    assert freed.spare() == 0
    held[0] = 100
    freed.begin()
    for now in (90, 70):
        held[0] = now
        spare = freed.spare()
    assert spare == 10
