"""A folder's own chat template, the shipped prompts, and the frame that LLaVA's authors once used.

The templates are those of llava-hf's processors, written down from their `chat_template.json`.
"""

import json

import pytest
import torch
from makers import damage, originals
from makers.families import PHRASE

from gap_export.errors import CheckpointError
from gap_export.pipeline.plan import plan_export
from gap_export.pipeline.request import make_request

QUESTION = (
    "Please provide the bounding box coordinate of the region this sentence describes: {phrase}"
)
IMAGES_FIRST = (
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
)
TEXTS = (
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] }}{% endfor %}"
)
VICUNA = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    + IMAGES_FIRST
    + TEXTS
    + "{{ ' ' }}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CHATML = (
    "{{ '<|im_start|>system\nAnswer the questions.<|im_end|>' }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    + IMAGES_FIRST
    + TEXTS
    + "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
"""That of a language model alone: the content is a text, and the prompt has its own start."""
ASKED = {
    "vicuna": f"USER: <image>\n{QUESTION} ASSISTANT:",
    "chatml": (
        "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\n"
        f"{QUESTION}<|im_end|><|im_start|>assistant\n"
    ),
    "mistral": f"[INST] <image>\n{QUESTION} [/INST]",
}
TEMPLATES = {"vicuna": VICUNA, "chatml": CHATML, "mistral": MISTRAL}


def edit(path, change):
    """Change a JSON file in place."""
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def put(folder, name, template):
    """Write a chat template as one of the library's versions did."""
    if name == "chat_template.jinja":
        (folder / name).write_text(template, encoding="utf-8")
    elif name == "list":
        named = [{"name": "tools", "template": "x"}, {"name": "default", "template": template}]
        edit(folder / "tokenizer_config.json", lambda data: data.update(chat_template=named))
    elif name == "tokenizer_config.json":
        edit(folder / name, lambda data: data.update(chat_template=template))
    else:
        (folder / name).write_text(json.dumps({"chat_template": template}), encoding="utf-8")


def ask(model, folder, tmp_path, **settings):
    request = make_request(
        model, checkpoint=folder, settings=settings, reference=False, out=tmp_path / "b"
    )
    return plan_export(request)


@pytest.mark.parametrize("kind", TEMPLATES)
@pytest.mark.parametrize(
    "place", ["chat_template.json", "chat_template.jinja", "tokenizer_config.json", "list"]
)
def test_a_folders_own_chat_template_is_asked_with(find, tmp_path, place, kind):
    case = find("llava-next-vicuna").copy(tmp_path / "home")
    put(case.place(), place, TEMPLATES[kind])
    plan = case.plan(tmp_path / "b")
    assert plan.prompt.template == ASKED[kind]
    # One start, from the tokenizer alone.
    ids = plan.encoder.encode(PHRASE).prefix
    assert ids.count(plan.tokenizer.token_to_id("<s>")) == ids[:1].count(
        plan.tokenizer.token_to_id("<s>")
    )


INTERNVL = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{{ 'PICTURE\n' }}{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)
"""That of the library's conversion, which has named the picture in two ways."""


@pytest.mark.parametrize("picture", ["<image>", "<IMG_CONTEXT>"])
@pytest.mark.parametrize("system", ["", "<|im_start|>system\nAnswer in boxes.<|im_end|>\n"])
def test_internvl_is_asked_with_its_folders_chat_template(find, tmp_path, picture, system):
    case = find("internvl3").copy(tmp_path / "home")
    plain = case.plan(tmp_path / "b")
    template = INTERNVL.replace("PICTURE", picture)
    put(case.place(), "chat_template.jinja", f"{{{{ {system!r} }}}}{template}")
    plan = case.plan(tmp_path / "b")
    assert plan.prompt.template == system + plain.prompt.template
    # What stands for the picture is the same three kinds of tokens.
    before = plan.tokenizer.encode(system, add_special_tokens=False).ids
    assert plan.encoder.encode(PHRASE).prefix == before + plain.encoder.encode(PHRASE).prefix
    assert plan.encoder.encode(PHRASE).suffix == plain.encoder.encode(PHRASE).suffix


def test_the_processors_template_comes_before_the_tokenizers(find, tmp_path):
    case = find("llava-next-vicuna").copy(tmp_path / "home")
    put(case.place(), "tokenizer_config.json", MISTRAL)
    put(case.place(), "chat_template.json", CHATML)
    assert case.plan(tmp_path / "b").prompt.template == ASKED["chatml"]
    put(case.place(), "chat_template.jinja", VICUNA)
    assert case.plan(tmp_path / "b").prompt.template == ASKED["vicuna"]


@pytest.fixture
def vicuna(tmp_path):
    return originals.make_llava_next(tmp_path / "vicuna", image_size=336, vision_layers=2)


CANVAS = {"image.canvas": "672x672/4:3", "prompt.suffix": 160}
"""And room for questions in the small tokenizer's many tokens."""


def test_a_shipped_prompt_wins_for_its_own_kind(vicuna, tmp_path):
    put(vicuna, "chat_template.json", VICUNA)
    plan = ask("llava-next-vicuna-7b", vicuna, tmp_path, **CANVAS)
    assert plan.prompt.template.startswith("A chat between a curious user")
    (note,) = plan.spec.notes
    assert note.startswith("asked with the model file's prompt; ")
    assert str(vicuna) in note


def test_a_shipped_prompt_gives_way_to_another_kinds(vicuna, tmp_path):
    put(vicuna, "chat_template.json", CHATML)
    plan = ask("llava-next-vicuna-7b", vicuna, tmp_path, **CANVAS)
    assert plan.prompt.template == ASKED["chatml"]
    (note,) = plan.spec.notes
    assert note.startswith("asked with the folder's own chat template, '<|im_start|>system")
    assert note.endswith("is for models of another kind than this checkpoint")


def test_a_mistral_under_the_name_of_a_vicuna(tmp_path):
    folder = originals.make_llava_next(
        tmp_path / "mistral", text="mistral", image_size=336, vision_layers=2
    )
    plan = ask("llava-next-vicuna-7b", folder, tmp_path, **CANVAS)
    assert plan.prompt.template == ASKED["mistral"]
    assert "that of a mistral of its kind" in plan.spec.notes[0]


def test_what_the_user_gives_wins(vicuna, tmp_path):
    put(vicuna, "chat_template.json", CHATML)
    mine = "<image> {phrase}?"
    settings = CANVAS | {"prompt.template": mine}
    plan = ask("llava-next-vicuna-7b", vicuna, tmp_path, **settings)
    assert (plan.prompt.template, plan.spec.notes) == (mine, ())
    file = tmp_path / "mine.toml"
    file.write_text(
        f'family = "llava_next"\ncheckpoint = "{vicuna}"\n[prompt]\ntemplate = "{mine}"\n',
        encoding="utf-8",
    )
    plan = ask(file, vicuna, tmp_path, **CANVAS)
    assert (plan.prompt.template, plan.spec.notes) == (mine, ())


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no pictures here') }}", "no pictures here"),
        ("{% for x in %}", "Expected an expression"),
        ("{{ 'hello' }}", "it does not give the picture once and the phrase behind it"),
    ],
)
def test_a_chat_template_that_cannot_be_used(find, tmp_path, template, reason):
    case = find("llava-next-vicuna").copy(tmp_path / "home")
    put(case.place(), "chat_template.json", template)
    plan = case.plan(tmp_path / "b")
    assert plan.prompt.template == ASKED["vicuna"]
    (note,) = plan.spec.notes
    assert note.startswith(f"{case.place()}: its chat template cannot be used ({reason}")


def test_a_broken_tokenizer_beside_a_chat_template(find, tmp_path):
    case = find("llava-next-vicuna").copy(tmp_path / "home")
    put(case.place(), "chat_template.json", VICUNA)
    (case.place() / "tokenizer.json").write_text('{"version": ', encoding="utf-8")
    with pytest.raises(CheckpointError, match="its tokenizer cannot be read"):
        case.plan(tmp_path / "b")


def test_a_language_model_that_no_prompt_is_known_for(find, tmp_path):
    case = find("llava").copy(tmp_path / "home")
    edit(case.place() / "config.json", lambda data: data["text_config"].update(model_type="qwen3"))
    with pytest.raises(CheckpointError, match="no prompt is known for a language model of type"):
        case.plan(tmp_path / "b")
    put(case.place(), "chat_template.json", CHATML)
    with pytest.raises(CheckpointError, match=r"norm\.weight' is missing"):
        case.plan(tmp_path / "b")


# `mm_use_im_start_end`.


@pytest.mark.parametrize("legacy", [True, False, None])
def test_a_framed_picture_of_the_authors(find, tmp_path, legacy):
    """Their `run_llava.py`: `<im_start><image><im_end>`, cut at `<image>`."""
    case = find("llava-original").copy(tmp_path / "home")
    before = case.plan(tmp_path / "a")
    folder = case.place()
    tokens = {"<im_patch>": 400, "<im_start>": 401, "<im_end>": 402}
    (folder / "added_tokens.json").write_text(json.dumps(tokens), encoding="utf-8")
    edit(
        folder / "config.json",
        lambda data: data.update(mm_use_im_start_end=True, vocab_size=403),
    )

    def lengthen(tensors):
        for key in tensors.keys() & {"model.embed_tokens.weight", "lm_head.weight"}:
            tensors[key] = torch.cat([tensors[key], tensors[key][:3]])

    damage.edit(folder, lengthen)
    edit(
        folder / "tokenizer_config.json",
        lambda data: data.pop("legacy", None) if legacy is None else data.update(legacy=legacy),
    )
    plan = case.plan(tmp_path / "b")
    assert "USER: <im_start><image><im_end>\n" in plan.prompt.template
    plain, framed = before.encoder.encode(PHRASE), plan.encoder.encode(PHRASE)
    # `USER: ` ends with a space, which is a piece of its own before an added token.
    assert framed.prefix == [*plain.prefix, 401]
    # A space begins the text right of the picture, and its files do not name `<im_end>`.
    begun = framed.suffix if legacy is not False else framed.suffix[1:]
    assert begun[0] == 402
    assert legacy is not False or framed.suffix[0] == plan.encoder.encode_phrase("\u2581")[0]
    eager = plan.family.load_eager(plan.checkpoint, plan.spec, "float32")
    prompt = plan.prompt.template.replace("{phrase}", PHRASE)
    assert eager.encode(prompt) == (framed.prefix, framed.suffix)


def test_a_frame_that_the_table_has_no_rows_for(find, tmp_path):
    case = find("llava-original").copy(tmp_path / "home")
    edit(case.place() / "config.json", lambda data: data.update(mm_use_im_start_end=True))
    with pytest.raises(CheckpointError) as caught:
        case.plan(tmp_path / "b")
    assert "the prompt holds '<im_start>', token 400" in str(caught.value)
