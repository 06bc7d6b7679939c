"""A pruner with `+ivc` from the command's words to the graphs and PyTorch's answers."""

import numpy as np
from makers.families import make_picture, make_samples
from transformers import AutoConfig

from gap_runtime import Bundle, Grounder


def test_a_bundle_keeps_the_papers_positions_and_exactly_the_count(tiny_llava, export, tmp_path):
    """The export compares graph and PyTorch; here the places are those of the paper's rule."""
    make_samples(tmp_path / "samples", make_picture(90, 61))
    folder = export(
        tiny_llava,
        tmp_path / "b",
        prune__strategy="FasterVLM+ivc",
        prune__keep=[9],
        prune__ivc=0.1,
        prompt__answer=2,
        check__samples=str(tmp_path / "samples"),
    )
    bundle = Bundle.open(folder)
    assert bundle.manifest.pruning.strategy == "cls_attention+ivc"
    text = AutoConfig.from_pretrained(tiny_llava).text_config
    width = text.hidden_size // text.num_attention_heads
    turns = text.rope_parameters["rope_theta"] ** -(np.arange(0, width, 2) / width)
    angles = (bundle.manifest.layout.prefix + np.arange(25))[:, None] * turns
    stay = set()
    for wave in (np.cos, np.sin):
        stay.update(np.argsort(-wave(angles).mean(axis=1), kind="stable")[:2].tolist())
    grounder, chosen = Grounder(bundle, "onnxruntime:cpu"), set()
    for seed in (1, 2):
        found = grounder.ground(make_picture(90, 61, seed=seed), "a cup", keep=9)
        assert len(set(found.kept_index)) == found.kept == 9
        assert stay <= set(found.kept_index)
        chosen.add(frozenset(found.kept_index))
    assert len(chosen) == 2
