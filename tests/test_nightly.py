"""When a nightly run happens and when it is skipped, without servers and without training.

.venv/bin/pytest tests/test_nightly.py
"""

from pathlib import Path

import pytest
from prefect.logging import disable_run_logger

from flows import nightly as module
from flows.pipeline import Overrides


@pytest.fixture
def night(monkeypatch, home, tmp_path):
    """Call one night; returns its state's name. The corpus id and whether the pipeline works are ours to set."""
    experiment = tmp_path / "words.yaml"
    experiment.write_text("data: {source: words.txt}\n")
    facts = {"corpus": "aaaa", "works": True, "notes": []}

    def pipeline(experiment, overrides):
        if not facts["works"]:
            raise RuntimeError("no memory")
        return {"run": f"words-{facts['corpus']}", "val_loss": 1.0, "val_bpb": 1.4427}

    monkeypatch.setattr(module, "pipeline", pipeline)
    monkeypatch.setattr(module, "locate_corpus", lambda data, home: Path(facts["corpus"]))
    monkeypatch.setattr(module, "_leave_note", facts["notes"].append)

    def call(force=False, **overrides):
        with disable_run_logger():
            result = module.nightly.fn(str(experiment), Overrides(**overrides), force)
        return "ran" if isinstance(result, dict) else f"{result.name}: {result.message}"

    call.facts = facts
    return call


def test_unchanged_text_is_skipped_with_a_reason(night):
    assert night() == "ran"
    assert night() == "Skipped: corpus aaaa unchanged since run words-aaaa"
    assert "unchanged since run words-aaaa" in night.facts["notes"][-1]


def test_changes_and_force_make_it_run(night):
    """A skip that looks at the corpus only would ignore a changed learning rate for ever."""
    night()
    night.facts["corpus"] = "bbbb"
    assert night() == "ran"
    assert night(lr=0.01) == "ran"
    assert night(lr=0.01).startswith("Skipped")
    assert night(lr=0.01, force=True) == "ran"


def test_failed_night_is_tried_again(night):
    """Remembering a run before it succeeded would skip every later night."""
    night.facts["works"] = False
    with pytest.raises(RuntimeError):
        night()
    night.facts["works"] = True
    assert night() == "ran"
