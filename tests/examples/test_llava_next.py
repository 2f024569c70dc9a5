import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache

import llava_next
from common import ASSETS, TINY_LLAVA, sample_documents
from mmshiftkv import CACHE_ARGUMENT
from tiny_llava import FAMILIES, IMAGE_SIZE, document_image, save_tiny_llava

QUESTION = "What is due?"
NEW_TOKENS = 12
# (width, height) of an image, and the tiles it is cut into, the scaled-down whole included
TILES = {(56, 56): 3, (300, 100): 4, (100, 300): 4, (400, 380): 5}


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny_llava(folder, request.param)
    for width, height in TILES:
        document_image(width, height).save(folder / f"{width}x{height}.png")
    return folder


def image_file(checkpoint, size):
    return str(checkpoint / "{}x{}.png".format(*size))


def run(capsys, checkpoint, *arguments):
    """The answer and the last row of the report, as (seen, stored), that the script prints."""
    fixed = ["--model", str(checkpoint), "--device-map", "cpu", "--question", QUESTION]
    llava_next.main([*fixed, "--max-new-tokens", str(NEW_TOKENS), *arguments])
    answer, table = capsys.readouterr().out.split("\nlayer ", maxsplit=1)
    (row,) = (line.split() for line in table.splitlines() if line.split()[0] == "all")
    _, seen, stored, *_ = row
    return answer, int(seen), int(stored)


def full_cache_answer(checkpoint, images):
    """What the library's own cache gives: the answer, the tokens the cache has seen, and the inputs."""
    processor = AutoProcessor.from_pretrained(checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    inputs = llava_next.build_inputs(processor, images, QUESTION)
    cache = DynamicCache()
    output = model.generate(**inputs, **{CACHE_ARGUMENT: cache}, max_new_tokens=NEW_TOKENS, do_sample=False)
    answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer, cache.get_seq_length(), inputs


@pytest.mark.parametrize("size", TILES, ids="{0[0]}x{0[1]}".format)
def test_a_budget_that_covers_the_prompt_gives_the_answer_of_the_full_cache(capsys, checkpoint, size):
    image = image_file(checkpoint, size)
    expected, seen_by_full, inputs = full_cache_answer(checkpoint, [image])
    assert inputs["pixel_values"].shape[1:] == (TILES[size], 3, IMAGE_SIZE, IMAGE_SIZE)
    answer, seen, stored = run(capsys, checkpoint, "--image", image, "--budget", "4096")
    assert answer == expected != ""
    assert seen == stored == seen_by_full


def test_two_images_can_be_asked_about(capsys, checkpoint):
    images = [image_file(checkpoint, size) for size in ((300, 100), (400, 380))]
    expected, seen_by_full, inputs = full_cache_answer(checkpoint, images)
    assert inputs["image_sizes"].tolist() == [[100, 300], [380, 400]]
    arguments = ["--image", images[0], "--image", images[1], "--budget", "1.0"]
    assert run(capsys, checkpoint, *arguments) == (expected, seen_by_full, seen_by_full)


def test_the_embedded_model_reads_a_form(capsys):
    sample = sample_documents(str(TINY_LLAVA))["form.png"][1]
    fixed = ["--model", "llava", "--device-map", "cpu", "--image", str(ASSETS / "form.png"), "--budget", "512"]
    llava_next.main([*fixed, "--question", sample["question"]])
    assert capsys.readouterr().out.splitlines()[0] == sample["answer"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_small_budget_keeps_that_many_prompt_tokens(capsys, checkpoint, attention):
    image = image_file(checkpoint, (400, 380))
    prompt = full_cache_answer(checkpoint, [image])[2]["input_ids"].shape[1]
    arguments = ["--image", image, "--budget", "24", "--attn", attention]
    answer, seen, stored = run(capsys, checkpoint, *arguments)
    assert seen - stored == prompt - 24
    assert run(capsys, checkpoint, *arguments) == (answer, seen, stored)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tiny_checkpoint_is_the_same_in_every_call(tmp_path, family):
    state = torch.get_rng_state()
    for folder in ("one", "two"):
        save_tiny_llava(tmp_path / folder, family)
    assert torch.equal(torch.get_rng_state(), state)
    weights = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("one", "two")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --image"),
        (["--image", "missing.png"], "argument --image: no such file: 'missing.png'"),
        (["--image", __file__], f"argument --image: not an image that can be read: {__file__!r}"),
        (["--image", str(ASSETS / "document_1.png"), "--budget", "-5"], "argument --budget: "),
    ],
)
def test_bad_arguments_are_refused(capsys, arguments, message):
    with pytest.raises(SystemExit):
        llava_next.main(arguments)
    assert message in capsys.readouterr().err
