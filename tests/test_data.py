import warnings

import numpy as np
import pytest

from moba_lab.data import (
    BOS,
    EXCLUDED,
    GENERATED,
    HELD_OUT,
    KEPT,
    MANIFEST,
    NAME,
    BatchSampler,
    compare_with_manifest,
    load_corpus,
    read_manifest,
    rename_names,
    verify_corpus,
    write_manifest,
)


@pytest.fixture(scope="module")
def stdlib():
    return load_corpus()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    for number in range(20):
        (tmp_path / f"{number:02}.txt").write_text(f"text {number}\n" * 9)
    (tmp_path / "sub" / "again.txt").write_text("text 3\n" * 9)
    (tmp_path / "picture.bin").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty.txt").touch()
    return tmp_path


def test_stdlib_leaves_out_tests_and_what_the_build_wrote(stdlib):
    assert len(stdlib.files) > 300
    for file in stdlib.files:
        parts = file.path.split("/")
        assert not EXCLUDED & set(parts)
        assert not parts[0].startswith(GENERATED)
        assert file.size > 0


def test_stdlib_holds_out_whole_packages(stdlib):
    for file in stdlib.files:
        package = file.path.split("/")[0]
        assert (file.split == "held-out") == (package in HELD_OUT), file.path
    held_out = sum(map(len, stdlib.held_out.values()))
    assert 0.05 < held_out / (held_out + len(stdlib.train)) < 0.08


def test_stdlib_files_are_in_order_and_different(stdlib):
    paths = [file.path for file in stdlib.files]
    assert paths == sorted(paths)
    assert len({file.sha256 for file in stdlib.files}) == len(paths)


def test_training_stream_holds_every_training_file_once(stdlib):
    training = [file for file in stdlib.files if file.split == "train"]
    assert len(stdlib.train) == sum(file.size + 1 for file in training)
    assert (stdlib.train == BOS).sum() == len(training)
    assert stdlib.train[0] == BOS


def test_folder_takes_text_and_drops_duplicates(folder):
    corpus = load_corpus(folder)
    paths = [file.path for file in corpus.files]
    assert paths == [f"{number:02}.txt" for number in range(20)]
    assert set(corpus.held_out) == {"00.txt", "16.txt"}
    assert corpus.held_out["16.txt"].tobytes() == b"text 16\n" * 9


def test_of_duplicates_the_held_out_file_stays(folder):
    (folder / "sub" / "again.txt").write_text("text 16\n" * 9)
    (folder / "10.txt").write_text("text 16\n" * 9)
    corpus = load_corpus(folder)
    assert "16.txt" in corpus.held_out
    assert b"text 16" not in corpus.train.tobytes()


def test_folder_without_enough_text_is_refused(tmp_path):
    (tmp_path / "one.txt").write_text("alone")
    with pytest.raises(ValueError, match="at least two different text files"):
        load_corpus(tmp_path)


def test_manifest_round_trip_and_differences(folder):
    files = load_corpus(folder).files
    write_manifest(files, folder / "manifest.tsv")
    manifest = read_manifest(folder / "manifest.tsv")
    (folder / "manifest.tsv").unlink()
    assert manifest == files
    assert not compare_with_manifest(files, manifest)
    (folder / "05.txt").write_text("other")
    (folder / "19.txt").unlink()
    (folder / "29.txt").write_text("new")
    found = compare_with_manifest(load_corpus(folder).files, manifest)
    assert (found.changed, found.missing, found.added) == (
        ("05.txt",),
        ("19.txt",),
        ("29.txt",),
    )


def test_verify_warns_and_goes_on(folder, tmp_path_factory):
    manifest = tmp_path_factory.mktemp("manifest") / "manifest.tsv"
    write_manifest(load_corpus(folder).files, manifest)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not verify_corpus(load_corpus(folder), manifest)
    (folder / "05.txt").write_text("other")
    with pytest.warns(UserWarning, match=r"1 changed: 05\.txt"):
        assert verify_corpus(load_corpus(folder), manifest)


def test_shipped_manifest_is_small_and_splits_by_package():
    assert MANIFEST.stat().st_size < 150_000
    files = read_manifest()
    assert len(files) > 300
    for file in files:
        assert len(file.sha256) == 64
        assert (file.split == "held-out") == (file.path.split("/")[0] in HELD_OUT)


def test_sampler_reads_every_window_once_per_epoch():
    stream = np.arange(200, dtype=np.uint8)
    sampler = BatchSampler(stream, batch=1, context=10, seed=0)
    starts = []
    while sampler.epoch == 0:
        tokens, targets = sampler.next_batch()
        np.testing.assert_array_equal(targets, tokens + 1)
        starts.append(int(tokens[0]))
    first_epoch, extra = starts[:-1], starts[-1]
    assert len(set(first_epoch)) == len(first_epoch) >= 18
    assert len({start % 10 for start in first_epoch}) == 1
    assert first_epoch != sorted(first_epoch)
    assert 0 <= extra < 190


@pytest.mark.parametrize("batches", [0, 3, 25])
def test_sampler_goes_on_from_its_state(batches):
    stream = np.random.default_rng(0).integers(97, 123, 500).astype(np.uint8)
    one = BatchSampler(stream, batch=2, context=16, seed=5, rename=0.5)
    for _ in range(batches):
        one.next_batch()
    other = BatchSampler(stream, batch=2, context=16, seed=5, rename=0.5)
    other.load_state_dict(one.state_dict())
    for _ in range(30):
        np.testing.assert_array_equal(one.next_batch(), other.next_batch())


def test_sampler_depends_on_its_seed():
    stream = np.arange(256, dtype=np.uint8)
    first, second = (BatchSampler(stream, 4, 8, seed).next_batch() for seed in (0, 1))
    assert (first[0] != second[0]).any()


def test_sampler_gives_a_name_another_spelling_in_every_window():
    stream = np.frombuffer(b"parse_line " * 40, np.uint8)
    sampler = BatchSampler(stream, batch=8, context=22, seed=0, rename=1.0)
    windows = sampler.next_batch()[0].astype(np.uint8).reshape(8, 22)
    spellings = [max(NAME.findall(row.tobytes()), key=len) for row in windows]
    new = [name for name in spellings if name not in b"parse_line"]
    assert len(new) > 1
    assert len(set(new)) == len(new)


def test_sampler_refuses_a_short_stream():
    with pytest.raises(ValueError, match="at least 2 \\* context = 20 bytes, got 19"):
        BatchSampler(np.zeros(19, dtype=np.uint8), batch=1, context=10, seed=0)


def test_rename_is_consistent_and_keeps_the_shape_of_the_text():
    text = b"class Parser_2:\n    def parse(self, line): return self.parse(line[1:])\n"
    renamed = rename_names(
        np.frombuffer(text, np.uint8), np.random.default_rng(1), share=1.0
    ).tobytes()
    assert len(renamed) == len(text)
    before, after = NAME.findall(text), NAME.findall(renamed)
    spelling = dict(zip(before, after, strict=True))
    assert [spelling[name] for name in before] == after
    assert spelling[b"self"] == b"self"
    assert spelling[b"return"] == b"return"
    assert spelling[b"parse"] != b"parse"
    assert spelling[b"Parser_2"][:1].isupper()
    assert spelling[b"Parser_2"].endswith(b"_2")
    assert b"class" in KEPT


def test_rename_by_share():
    text = np.frombuffer(b" ".join(b"name%04d" % n for n in range(400)), np.uint8)
    words = text.tobytes().split()
    rng = np.random.default_rng(0)
    kept = set(words) & set(rename_names(text, rng, share=0.25).tobytes().split())
    assert 0.68 < len(kept) / len(words) < 0.82
    same = rename_names(text, np.random.default_rng(0), share=0.0)
    np.testing.assert_array_equal(same, text)
