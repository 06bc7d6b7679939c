"""The training's own forward pass gives what Hugging Face's gives."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from gap_runtime.evaluation.refshapes256 import draw_scene

SCRIPT = Path(__file__).parents[2] / "refshapes" / "train256.py"


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(SCRIPT.parent))
    yield load(SCRIPT)
    sys.path.remove(str(SCRIPT.parent))
    for name in [
        name for name in sys.modules if name in {"train256", "train"} or name == "recipe"
    ]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("name", "side", "layers"), [("checkpoint", 112, 5), ("checkpoint-256", 224, 6)]
)
def test_the_recipe_makes_the_model_that_is_shipped(name, side, layers, script):
    """Tokenizer and sizes; the weights are what the training is for."""
    folder = SCRIPT.parent / name
    recipe = script if name == "checkpoint-256" else load(SCRIPT.with_name("train.py"))
    tokenizer = recipe.build_tokenizer()
    shipped = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert json.loads(tokenizer.backend_tokenizer.to_str()) == shipped
    with torch.device("meta"):
        model = recipe.make_model(tokenizer, side=side, patch=14, layers=layers)
    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = sorted(file.get_slice(key).get_shape() for key in file.keys())  # noqa: SIM118
    # The files have the names of an older library.
    assert stored == sorted(list(value.shape) for value in model.state_dict().values())


@pytest.fixture(scope="module")
def trainer(script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("train256")
    with torch.random.fork_rng():
        return script.Trainer(seed=0, out=folder / "out", state_file=folder / "state.pt")


@pytest.fixture(scope="module")
def batch(trainer):
    scene = draw_scene("val", 1)
    return trainer.batches.make([scene], [list(scene.questions[:2])], 16)


def pixels_of(batch):
    """Patches [1, 256, 588] as the picture [1, 3, 224, 224]."""
    return (
        batch.patches.view(1, 16, 16, 3, 14, 14).permute(0, 3, 1, 4, 2, 5).reshape(1, 3, 224, 224)
    )


@torch.no_grad()
def test_the_forward_pass_is_the_librarys(script, trainer, batch):
    model = trainer.model
    model.set_attn_implementation("eager")
    llava, pixels = model.model, pixels_of(batch)
    tower = llava.vision_tower(pixels, output_hidden_states=True, output_attentions=True)
    features, looked = script.see(llava.vision_tower, batch.patches)
    torch.testing.assert_close(features, tower.hidden_states[-2], atol=1e-4, rtol=0)
    expected = tower.attentions[1][:, :, 0, 1:].mean(dim=1)
    torch.testing.assert_close(looked, expected, atol=1e-6, rtol=0)

    embed, projector = llava.language_model.embed_tokens, llava.multi_modal_projector
    visual = projector(features[:, 1:])
    seen = torch.cat([embed(trainer.batches.prefix)[None], visual], dim=1)
    layers = llava.language_model.layers
    _, said, _ = script.think(layers, seen, embed(batch.token_ids), trainer.frequencies)
    for q in range(2):
        image = torch.full((256,), model.config.image_token_index)
        ids = torch.cat([trainer.batches.prefix, image, batch.token_ids[0, q]])[None]
        expected = model(input_ids=ids, pixel_values=pixels).logits[
            0, -batch.token_ids.shape[-1] :
        ]
        hidden = script.norm(said[-1][0, q], llava.language_model.norm.weight)
        torch.testing.assert_close(model.lm_head(hidden), expected, atol=1e-5, rtol=0)


def test_every_digit_is_a_token(trainer):
    tokens = trainer.tokenizer.tokenize("[0.47, 1.00, 0.12, 0.99]")
    assert tokens == [
        *("\u2581[", "0", ".", "4", "7", ",", "\u2581", "1", ".", "0", "0", ",", "\u2581"),
        *("0", ".", "1", "2", ",", "\u2581", "0", ".", "9", "9", "]"),
    ]


def test_one_rotary_frequency_turns_once_per_row(trainer):
    assert float(trainer.frequencies[1]) == pytest.approx(2 * torch.pi / 16)


def test_a_run_that_was_stopped_goes_on_where_it_was(script, trainer):
    trainer.update()
    trainer.save()
    again = script.Trainer(seed=0, out=trainer.out, state_file=trainer.state_file)
    again.restore(torch.load(trainer.state_file))
    assert again.step == 1
    one, other = trainer.update(), again.update()
    assert {k: float(v) for k, v in one.items()} == {k: float(v) for k, v in other.items()}
