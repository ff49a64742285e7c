"""The demo prefills once, resumes in new processes, and says what that brought."""

import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace

import pytest

import kvstore
from kvstore.cli.commands.demo import format_report, format_result
from kvstore.format.block import ignore_progress
from kvstore.models import demo

CODECS = ("raw", "planes+zstd", "turbo4+zstd")


def run_demo(model, **options):
    """Run the demo, quickly; return what it found and what it said."""
    notes = []
    options = {"num_tokens": 600, "codecs": CODECS, "max_tokens": 8} | options
    result = demo.run_demo(str(model), note=notes.append, **options)
    return result, notes


@pytest.fixture(scope="module")
def finished(tiny_model):
    """What a demo found, and what it said."""
    return run_demo(tiny_model)


@pytest.fixture
def tiny_demo(tiny_model):
    """A demo before it has read anything."""
    loaded = demo._load(str(tiny_model), None, False)
    return demo._Demo(loaded, lambda what: ignore_progress, lambda message: None)


def test_every_way_is_resumed_in_a_new_process(finished):
    """There are prefill, mlx-lm's file and each codec, and so many processes ran."""
    result, notes = finished
    assert [row.way for row in result.rows] == [demo.PREFILL, demo.MLX_LM, *CODECS]
    assert [note[:6] for note in notes[-4:]] == [f"{n} of 4" for n in range(1, 5)]


def test_a_lossless_codec_gives_the_same_answer(finished):
    """What was kept without loss answers as if nothing had happened."""
    prefill, *others = finished[0].rows
    exact = [row for row in others if "turbo" not in row.way]
    assert [row.is_same for row in exact] == [True] * 3
    assert {row.answer for row in exact} == {prefill.answer}
    assert prefill.num_answer == 8


def test_the_table_holds_what_was_measured(finished):
    """Sizes are those of files, and a speedup is prefill by resume."""
    prefill, mlx_file, raw, planes, turbo = finished[0].rows
    assert prefill.nbytes is None
    assert mlx_file.nbytes > raw.nbytes > planes.nbytes > turbo.nbytes > 0
    assert raw.speedup == prefill.first_s / raw.first_s
    assert all(0 < row.first_s < row.answer_s for row in (prefill, raw, turbo))


def test_nothing_is_left_behind(tiny_model, tmp_path, monkeypatch):
    """No store, no file; neither where it worked nor where stores usually lie."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("KVSTORE_DIR", str(tmp_path / "store"))
    text = tmp_path / "mine.txt"
    text.write_text("Once upon a time.")
    options = {"document": text, "question": "When?", "num_tokens": None}
    result, _ = run_demo(tiny_model, codecs=("turbo2",), **options)
    assert (result.question, result.num_tokens < 100) == ("When?", True)
    assert list((tmp_path / "tmp").iterdir()) == []
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("num_tokens", [1, 200, 256, 257, 512])
def test_a_document_is_cut_to_length(tiny_demo, num_tokens):
    """What is read has about so many tokens, and a question follows."""
    document, question = tiny_demo.make_tokens("long " * 200, "Why?", num_tokens)
    assert num_tokens <= len(document) <= max(num_tokens, 100)
    assert "Why?" in tiny_demo._loaded.tokenizer.decode(question)


@pytest.mark.parametrize("num_tokens", [256, pytest.param(257, marks=pytest.mark.slow)])
def test_a_model_with_a_window_is_resumed_too(tiny_model, tmp_path, num_tokens):
    """Layers that forget what is long past are restored as well."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    layers = {"layer_types": ["sliding_attention", "full_attention"]}
    config |= layers | {"sliding_window": 64}
    (folder / "config.json").write_text(json.dumps(config))
    options = {"num_tokens": num_tokens, "codecs": ("planes+zstd",)}
    result, _ = run_demo(folder, **options)
    assert result.rows[-1].is_same
    assert result.rows[-1].num_answer == 8


def test_a_slow_model_reads_a_short_document(tiny_demo, monkeypatch):
    """Where 2,000 tokens would take long, the demo reads 256, and says so."""
    notes = []
    tiny_demo._note = notes.append
    assert tiny_demo._choose_length("long " * 200) == 2000
    monkeypatch.setattr(demo, "_PATIENCE_S", 0.0)
    assert tiny_demo._choose_length("long " * 200) == 256
    assert len(notes) == 1
    assert "256 tokens instead of 2,000" in notes[0]


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "No such file"), (b"\xff\xfe", "not UTF-8"), (b" \n", "is empty")],
)
def test_a_document_that_cannot_be_read_is_an_error(tmp_path, content, reason):
    """The error names the file and says why, before a model is loaded."""
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(kvstore.KVStoreError, match=reason) as caught:
        run_demo("missing", document=path)
    assert str(path) in str(caught.value)


def test_an_unknown_codec_is_told_before_the_model_is_loaded():
    """A typing error costs no waiting."""
    with pytest.raises(kvstore.CodecError, match="unknown codec `turbo0`"):
        run_demo("missing", codecs=("raw", "turbo0"))


def test_a_cache_that_cannot_be_stored_is_told_before_prefill():
    """The error names the class and the layer."""

    class Odd:
        """A cache that nobody knows."""

    class Model:
        """A model that wants one."""

        def make_cache(self):
            return [Odd()]

    with pytest.raises(kvstore.UnsupportedCacheError, match=r"layer 0 is an? Odd"):
        demo._empty_cache(Model())


def test_a_store_that_lost_the_rows_is_an_error(tiny_model, tmp_path):
    """The new process finds that nothing is there, and its error arrives here."""
    kvstore.Store(tmp_path / "store").close()
    words = ([1, 2, 3], [4], 8, str(tmp_path / "store"))
    job = demo.Job(str(tiny_model), None, False, *words)
    with pytest.raises(kvstore.KVStoreError, match="gave back 0 of 3 tokens: "):
        demo._start_process(job)
    with pytest.raises(kvstore.KVStoreError, match="no model `missing`"):
        demo._start_process(replace(job, model="missing"))


def test_a_process_that_dies_is_an_error(tmp_path, monkeypatch):
    """Whatever kills the new process, there is an error and no wrong number."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    job = demo.Job("m", None, False, [1], [2], 8)
    with pytest.raises(kvstore.KVStoreError, match="failed with exit code 1"):
        demo._start_process(job)


def test_importing_the_demo_leaves_openblas_its_chance():
    """Neither this module nor what it imports brings MLX."""
    program = "import sys, kvstore.models.demo; sys.exit('mlx.core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_table_is_readable():
    """One line per way; answers are printed where they differ."""
    same = demo.DemoRow("raw", 0.4, 0.5, 40, 1, "Yes.", 2, 2, True, 5_000_000, 0.1, 30)
    differs = replace(same, way="turbo2", answer="No.", num_same=0, is_same=False)
    prefill = replace(same, way=demo.PREFILL, nbytes=None, speedup=1.0)
    result = demo.DemoResult("m", 2000, "Is it?", (prefill, same, differs))
    text = format_result(result)
    assert [" ".join(line.split()) for line in text.splitlines()[3:6]] == [
        "prefill 0.50 s 1.0× 1.00 s",
        "raw 5.0 MB 0.50 s 40× 1.00 s yes",
        "turbo2 5.0 MB 0.50 s 40× 1.00 s first 0 of 2",
    ]
    long = replace(differs, way=demo.MLX_LM, num_same=12, num_answer=23)
    wide = format_result(replace(result, rows=(prefill, long)), 80)
    assert "first 12 of 23" in wide
    assert max(map(len, wide.splitlines())) <= 80
    assert text.endswith("question: Is it?\nprefill: Yes.\nturbo2: No.")
    assert json.loads(json.dumps(asdict(result)))["rows"][1]["way"] == "raw"


@pytest.mark.slow
def test_a_bench_is_a_report_to_paste(run_cli, tiny_model):
    """It has each way to save, what it took, and the machine."""
    words = ("bench", "--model", tiny_model, "--num-tokens", 600, "--codec", "raw")
    code, out, err = run_cli(*words, "--json")
    assert code == 0, err
    data = json.loads(out)
    ways = {row["way"]: row for row in data["rows"]}
    assert set(ways) == {demo.PREFILL, demo.MLX_LM, "raw"}
    assert ways["raw"]["save_s"] > 0
    assert ways["raw"]["load_s"] < ways["raw"]["first_s"]
    assert "mlx-lm" in data["machine"]["versions"]


def test_the_report_has_a_line_for_each_codec(finished):
    """Where loading never pays, it says no number; what it ran on stands below."""
    table = format_report(finished[0], {"cores": "2"}).splitlines()
    ways = [line.split(" | ")[0] for line in table if line.startswith("| ")]
    assert ways == ["|", f"| {demo.MLX_LM}", *(f"| {codec}" for codec in CODECS)]
    assert table[4].endswith("| - |")
    assert table[-1] == "* cores: 2"


def test_loading_pays_where_it_is_faster(tiny_demo, tmp_path):
    """The break-even is of this machine: none where computing takes no time."""
    document, question = tiny_demo.make_tokens("long " * 900, "Why?", 800)
    job = demo.Job("m", None, False, document, question, 8)
    demo._read(tiny_demo._loaded.model, tiny_demo._cache, document, ignore_progress)
    slow = tiny_demo._save(job, "raw", tmp_path / "slow", 1000.0)
    fast = tiny_demo._save(job, "raw", tmp_path / "fast", 1e-12)
    assert slow["nbytes"] == fast["nbytes"] > 0
    assert 0 < slow["pays_from"] < 100
    assert fast["pays_from"] is None
