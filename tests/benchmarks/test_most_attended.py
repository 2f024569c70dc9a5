import json
from collections import Counter

import pytest
import torch

from benchmarks.quality import sinks
from benchmarks.quality.sinks_measurement import MostAttended, most_attended


def test_the_share_is_a_mean_over_query_heads_and_steps():
    attention = torch.zeros(2, 2, 5)  # two prompts, two KV heads of three query heads each
    attention[0, :, 3] = torch.tensor([4.0, 2.0])  # of 6 heads in 2 steps
    attention[0, 0, 1] = 5.0
    attention[1, :, 0] = 3.0  # all that 6 heads have in 1 step
    ((share, column),) = most_attended([attention], heads=6, steps=torch.tensor([2, 1]))
    assert share.tolist() == [0.5, 1.0]
    assert column.tolist() == [3, 0]


def test_the_table_names_the_token_that_it_is_most_often():
    layers = [MostAttended([0.25, 0.75, 0.5, 0.5], Counter({"<s> (first)": 3, "?": 1}))]
    header, row = sinks.table(layers).splitlines()
    assert header.split("  ")[0] == "layer"
    assert row.split() == ["0", "50.0", "<s>", "(first)", "75"]


@pytest.mark.parametrize("model", ["qwen", "llava"])
def test_both_models_are_measured(model, tmp_path, capsys):
    from common import NAMED_MODELS

    options = ["--model", str(NAMED_MODELS[model]), "--count", "1", "--tasks", "lookup", "--device", "cpu"]
    sinks.main([*options, "--json", str(tmp_path / "sinks.json")])
    recorded = json.loads((tmp_path / "sinks.json").read_text(encoding="utf-8"))
    assert len(recorded["layers"]) == 6
    assert all(0 < layer["mean"] < 1 and sum(layer["tokens"].values()) == 1 for layer in recorded["layers"])
    assert f"{100 * recorded['layers'][5]['mean']:.1f}" in capsys.readouterr().out.splitlines()[-1]
