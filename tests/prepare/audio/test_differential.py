"""Our decoding equals that of the ffmpeg program. `benchmarks.decode_campaign` reads thousands of such files."""

import numpy as np
import pytest

from pipeline.prepare.audio import packets
from pipeline.prepare.audio.decode import decode_section
from pipeline.prepare.audio.packets import SEEKABLE
from pipeline.prepare.clip import ClipError
from tests.prepare import differential
from tests.prepare.differential import ENCODINGS, Maker, same_where_repeatable, verdict
from tests.prepare.sound import signal

NUM_FILES = 210


@pytest.fixture(scope="module")
def maker(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    return Maker(tmp_path_factory.mktemp("differential"))


def test_seeded_files_are_read_like_the_ffmpeg_program_reads_them(maker: Maker):
    assert 3 * len(ENCODINGS) <= NUM_FILES  # each encoding with three odd things
    outcomes = {}
    with np.errstate(all="ignore"):  # correlations with silence
        for number in range(20_000, 20_000 + NUM_FILES):
            made = maker.make(number)
            outcomes[made.name] = verdict(made)
            made.path.unlink()
    assert [f"{name}: {outcome}" for name, outcome in outcomes.items() if outcome.startswith("UNEXPLAINED")] == []
    assert sum(outcome == "equal" for outcome in outcomes.values()) > 0.6 * NUM_FILES


def test_where_the_program_differs_from_itself_any_other_difference_still_counts():
    sound = signal(1.0)
    other, elsewhere = sound.copy(), sound.copy()
    other[8000:8100] *= -1
    elsewhere[2000:2100] *= -1
    for ours in (sound, other):
        assert same_where_repeatable(ours, [sound, other, sound])
    assert not same_where_repeatable(elsewhere, [sound, other, sound])
    assert not same_where_repeatable(other, [sound, sound, sound])
    assert not same_where_repeatable(sound[:-1], [sound, other])


MP3 = {
    "mp3": ("mp3", ("-c:a", "libmp3lame")),
    "mp3, variable": ("mp3", ("-c:a", "libmp3lame", "-q:a", 4)),
    "mp3, without a count of frames": ("mp3", ("-c:a", "libmp3lame", "-q:a", 4, "-write_xing", 0)),
    "mp2": ("mp2", ("-c:a", "mp2")),
}


def test_mp3_sections_by_a_seek_equal_those_read_from_the_beginning(maker: Maker, monkeypatch: pytest.MonkeyPatch):
    """FFmpeg seeks by counting frames, not by the bit rate, so bytes between the frames do not matter."""
    monkeypatch.setattr(differential, "ENCODINGS", MP3)
    monkeypatch.setattr(differential, "LENGTH_S", 12.0)
    longer = Maker(maker.folder / "longer")
    num_read, odds = 0, set()
    for number in range(24):
        made = longer.make(number)
        start_s = round(float(np.random.default_rng(number).uniform(2, 9)), 3)
        sections = []
        for seekable in (SEEKABLE, SEEKABLE - {"mp3"}):
            monkeypatch.setattr(packets, "SEEKABLE", seekable)
            try:
                sections.append(decode_section(f"file:{made.path}", start_s, 2.0))
            except ClipError as err:
                sections.append(np.frombuffer(err.message.encode(), np.uint8))
        rounding = 2.0**-14 if made.encoding == "mp2" else 0  # its dither depends on all samples before
        np.testing.assert_allclose(*sections, rtol=0, atol=rounding, err_msg=f"{made.name}, {start_s}")
        num_read += sections[0].dtype == np.float32
        odds.add(made.odd)
    assert num_read > 18
    assert {"damaged", "flipped bits", "joined", "tag between"} <= odds
