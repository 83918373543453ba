import pytest

from phantom_jax.checkpoints import tensor_report
from phantom_jax.checkpoints.tensor_report import Entry

ENTRIES = [
    Entry("model.norm.weight", ("params/language_model/final_norm/scale",), "kept"),
    Entry("model.layers.0.self_attn.rotary_emb.inv_freq", (), "dropped", "follow from the config"),
    Entry("model.layers.1.self_attn.rotary_emb.inv_freq", (), "dropped", "follow from the config"),
    Entry("logit_scale", (), "dropped", "is not the tower's"),
    Entry("", ("params/projector/linear_1/kernel", "params/projector/linear_1/bias"), "fresh", "no projector given"),
]


def test_summary_counts_actions_and_reasons():
    assert tensor_report.summary(ENTRIES) == (
        "tensors: 1 kept; 1 fresh (no projector given: 1); 3 dropped (follow from the config: 2, is not the tower's: 1)"
    )
    assert tensor_report.summary([]) == "tensors: none"


def test_file_has_a_line_for_each_entry(tmp_path):
    tensor_report.write(ENTRIES, tmp_path / "report.tsv")
    lines = [line.split("\t") for line in (tmp_path / "report.tsv").read_text().splitlines()]
    assert lines[0] == ["name", "parameters", "action", "reason"]
    assert lines[1] == ["model.norm.weight", "params/language_model/final_norm/scale", "kept", ""]
    assert lines[5][1:3] == ["params/projector/linear_1/kernel params/projector/linear_1/bias", "fresh"]
    assert len(lines) == 6


def test_other_actions_do_not_exist():
    with pytest.raises(ValueError, match="'lost'"):
        Entry("lm_head.weight", (), "lost")
