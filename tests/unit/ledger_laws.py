"""What every entry of a ledger must keep, of vLLM or of Ray."""

from pathlib import Path

import ledger  # patches/ is on pytest's path

ROOT = Path(__file__).resolve().parents[2]


def by_id(value):
    return getattr(value, "id", None)


def check_target(touch):
    assert ledger.fingerprint(touch.target) == touch.fingerprint, touch.why


def check_our_side(touch):
    file, _, symbol = touch.where.partition(":")
    assert ledger.defined_in(ROOT / file, symbol)


def check_entries(touches, kinds, processes):
    """`kinds` by the letters an id begins with."""
    ids = [touch.id for touch in touches]
    assert len(set(ids)) == len(ids)
    for touch in touches:
        assert touch.kind == kinds[touch.id.rstrip("0123456789")]
        assert touch.process in processes
        assert touch.why
        assert touch.remove_when


def check_passes(file, touches, capsys):
    assert ledger.check(file) == 0
    assert f"{len(touches)} touches, 0 not as written" in capsys.readouterr().out
