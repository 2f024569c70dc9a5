"""How the processors of the families are set up for images of a few tokens."""

from dataclasses import dataclass, field
from typing import Any

from .exceptions import PINPOINTS


@dataclass(frozen=True)
class Recipe:
    """One family's processor.

    Attributes:
        processor, image_processor: names of classes of transformers.
        text: what stands for an image in a prompt.
        tokens: the texts of special tokens, and the names that the config has for their ids ("part.name" in a part);
            None: any free id.
        names: the names by which the processor asks the tokenizer for special tokens, and their texts.
        sizes: settings of the image processor.
        settings: settings of the processor.
        others: names of further processors that it takes, by argument.
    """

    processor: str
    image_processor: str
    text: str
    tokens: dict[str, str | None]
    names: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)


_SQUARE = {"size": {"height": 56, "width": 56}}
_QWEN_TOKENS: dict[str, str | None] = {
    "<|image_pad|>": "image_token_id",
    "<|video_pad|>": "video_token_id",
    "<|vision_start|>": "vision_start_token_id",
    "<|vision_end|>": "vision_end_token_id",
}
_QWEN_TEXT = "<|vision_start|><|image_pad|><|vision_end|>"


def _qwen(processor: str, patch_size: int = 14, video: str = "Qwen2VLVideoProcessor") -> Recipe:
    return Recipe(
        processor,
        "Qwen2VLImageProcessor",
        _QWEN_TEXT,
        _QWEN_TOKENS,
        sizes={"patch_size": patch_size, "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 64}},
        others={"video_processor": video},
    )


def _glm(version: str) -> Recipe:
    return Recipe(
        f"{version}Processor",
        f"{version}ImageProcessor",
        "<|begin_of_image|><|image|><|end_of_image|>",
        {
            "<|image|>": "image_token_id",
            "<|video|>": "video_token_id",
            "<|begin_of_image|>": "image_start_token_id",
            "<|end_of_image|>": "image_end_token_id",
        },
        sizes={"size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 64}},
        others={"video_processor": f"{version}VideoProcessor"},
    )


def _llava(processor: str, image_processor: str, **sizes: Any) -> Recipe:
    return Recipe(
        processor,
        image_processor,
        "<image>",
        {"<image>": "image_token_id"},
        sizes={"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}, **sizes},
        settings={"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    )


def _idefics(name: str, **more: Any) -> Recipe:
    splits = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    return Recipe(
        f"{name}Processor",
        f"{name}ImageProcessor",
        "<image>",
        {
            "<image>": "image_token_id",
            **dict.fromkeys(["<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *splits]),
        },
        sizes={"size": {"longest_edge": 256}, "max_image_size": {"longest_edge": 128}},
        **more,
    )


def _minicpm(version: str) -> Recipe:
    names = ("image_start", "image_end", "slice_start", "slice_end", "image_id_start", "image_id_end")
    ids = names[:4]
    return Recipe(
        f"MiniCPMV{version}Processor",
        "MiniCPMV4_6ImageProcessor",
        "<|image_pad|>",
        {
            "<|image_pad|>": "image_token_id",
            "<|video_pad|>": "video_token_id",
            **{f"<{name}>": f"{name}_id" if version == "4_7" and name in ids else None for name in names},
        },
        names={
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            **{f"{name}_token": f"<{name}>" for name in names},
        },
        sizes={"scale_resolution": 128, "patch_size": 16, "max_slice_nums": 2},
        others={"video_processor": "MiniCPMV4_6VideoProcessor"},
    )


_GEMMA_NAMES = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<image>"}

RECIPES: dict[str, Recipe] = {
    "gemma3": Recipe(
        "Gemma3Processor",
        "Gemma3ImageProcessor",
        "<boi>",
        {"<boi>": "boi_token_index", "<eoi>": "eoi_token_index", "<image>": "image_token_index"},
        names=_GEMMA_NAMES,
        sizes={"size": {"height": 64, "width": 64}},
        settings={"image_seq_length": 4},
    ),
    "gemma4": Recipe(
        "Gemma4Processor",
        "Gemma4ImageProcessor",
        "<image>",
        {
            "<boi>": "boi_token_id",
            "<eoi>": "eoi_token_id",
            "<image>": "image_token_id",
            "<audio>": "audio_token_id",
            "<boa>": "boa_token_id",
            "<eoa>": "eoa_token_index",
            "<|video|>": "video_token_id",
        },
        names={**_GEMMA_NAMES, "audio_token": "<audio>", "boa_token": "<boa>", "eoa_token": "<eoa>"},
        sizes={"max_soft_tokens": 70},
        others={"feature_extractor": "Gemma4AudioFeatureExtractor", "video_processor": "Gemma4VideoProcessor"},
    ),
    "glm4v": _glm("Glm4v"),
    "glm4v_moe": _glm("Glm4v"),
    "glm46v": _glm("Glm46V"),
    "idefics3": _idefics("Idefics3", settings={"image_seq_len": 4}),
    "internvl": Recipe(
        "InternVLProcessor",
        "GotOcr2ImageProcessor",
        "<IMG_CONTEXT>",
        {"<IMG_CONTEXT>": "image_token_id", "<img>": None, "</img>": None, "<video>": None},
        names={
            "context_image_token": "<IMG_CONTEXT>",
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "video_token": "<video>",
        },
        sizes={**_SQUARE, "max_patches": 2},
        settings={"image_seq_length": 4},
        others={"video_processor": "InternVLVideoProcessor"},
    ),
    "llama4": Recipe(
        "Llama4Processor",
        "Llama4ImageProcessor",
        "<|image|>",
        {
            "<|patch|>": "image_token_id",
            "<|image_start|>": "boi_token_index",
            "<|image_end|>": "eoi_token_index",
            **dict.fromkeys(["<|image|>", "<|tile_x_separator|>", "<|tile_y_separator|>"]),
        },
        sizes={**_SQUARE, "max_patches": 2},
    ),
    "llava": _llava("LlavaProcessor", "LlavaImageProcessor"),
    "llava_next": _llava("LlavaNextProcessor", "LlavaNextImageProcessor", image_grid_pinpoints=PINPOINTS),
    "llava_onevision": Recipe(
        "LlavaOnevisionProcessor",
        "LlavaOnevisionImageProcessor",
        "<image>",
        {"<image>": "image_token_id", "<video>": "video_token_id"},
        sizes={**_SQUARE, "image_grid_pinpoints": PINPOINTS},
        settings={"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
        others={"video_processor": "LlavaOnevisionVideoProcessor"},
    ),
    "minicpmv4_6": _minicpm("4_6"),
    "minicpmv4_7": _minicpm("4_7"),
    "mistral3": Recipe(
        "PixtralProcessor",
        "PixtralImageProcessor",
        "[IMG]",
        {"[IMG]": "image_token_id", "[IMG_BREAK]": None, "[IMG_END]": None},
        sizes={"size": {"longest_edge": 64}, "patch_size": {"height": 16, "width": 16}},
        settings={"patch_size": 16, "spatial_merge_size": 2},
    ),
    "molmo2": Recipe(
        "Molmo2Processor",
        "Molmo2ImageProcessor",
        "<|image|>",
        {
            "<im_patch>": "image_patch_id",
            "<im_start>": "image_start_token_id",
            "<im_end>": "image_end_token_id",
            "<low_res_im_start>": "low_res_image_start_token_id",
            "<frame_start>": "frame_start_token_id",
            "<frame_end>": "frame_end_token_id",
            **dict.fromkeys(["<|image|>", "<|video|>", "<im_col>", "<im_low>"]),
        },
        sizes={**_SQUARE, "max_crops": 2, "overlap_margins": [1, 1]},
        others={"video_processor": "Molmo2VideoProcessor"},
    ),
    "paligemma": Recipe(
        "PaliGemmaProcessor",
        "SiglipImageProcessor",
        "<image>",
        {"<image>": "image_token_id"},
        names={"image_token": "<image>"},
        sizes={**_SQUARE, "image_seq_length": 16},
    ),
    "phi4_multimodal": Recipe(
        "Phi4MultimodalProcessor",
        "Phi4MultimodalImageProcessor",
        "<image>",
        {"<image>": "vision_config.image_token_id", "<audio>": "audio_config.audio_token_id"},
        names={"image_token": "<image>", "audio_token": "<audio>"},
        sizes={"dynamic_hd": 1},
        others={"audio_processor": "Phi4MultimodalFeatureExtractor"},
    ),
    "qwen2_5_vl": _qwen("Qwen2_5_VLProcessor"),
    "qwen2_vl": _qwen("Qwen2VLProcessor"),
    "qwen3_5": _qwen("Qwen3VLProcessor", 16, "Qwen3VLVideoProcessor"),
    "qwen3_5_moe": _qwen("Qwen3VLProcessor", 16, "Qwen3VLVideoProcessor"),
    "qwen3_vl": _qwen("Qwen3VLProcessor", 16, "Qwen3VLVideoProcessor"),
    "qwen3_vl_moe": _qwen("Qwen3VLProcessor", 16, "Qwen3VLVideoProcessor"),
    "smolvlm": _idefics("SmolVLM", settings={"image_seq_len": 4}, others={"video_processor": "SmolVLMVideoProcessor"}),
}
