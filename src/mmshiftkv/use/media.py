"""Images and videos as they are given, checked before anything else happens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch


def checked_images(images: Any, name: str = "images") -> list[Any]:
    """The images as a list; files are read.

    Args:
        images: None, one image, or several: PIL images, arrays, tensors, or files by path or address.
        name: what the argument is called.

    Raises:
        TypeError: something that is no image.
        ValueError: a file that cannot be read as an image.
    """
    if images is None:
        return []
    given = images if isinstance(images, Sequence) and not isinstance(images, str) else [images]
    return [_checked_image(image, f"{name}[{place}]") for place, image in enumerate(given)]


def _checked_image(image: Any, name: str) -> Any:
    from PIL import Image
    from transformers.image_utils import load_image

    if isinstance(image, Image.Image):
        return image
    if isinstance(image, np.ndarray | torch.Tensor):
        if image.ndim != 3:
            raise ValueError(f"{name} has shape {tuple(image.shape)}, an image has three axes")
        return image
    if not isinstance(image, str | Path):
        raise TypeError(f"{name} is a {type(image).__name__}: give a PIL image, an array, a tensor, or a file")
    try:
        return load_image(str(image))
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}={str(image)!r} cannot be read as an image: {error}") from error


def checked_videos(videos: Any) -> list[Any]:
    """The videos as a list, each a list of frames.

    Args:
        videos: None, or several videos, each a sequence of frames, which are as images are.

    Raises:
        TypeError, ValueError: as `checked_images`, or a video without frames.
    """
    if videos is None:
        return []
    if not isinstance(videos, Sequence) or isinstance(videos, str):
        raise TypeError(f"videos is a {type(videos).__name__}: give a list of videos, each a list of frames")
    checked = []
    for place, video in enumerate(videos):
        if not isinstance(video, Sequence) or isinstance(video, str) or not video:
            raise TypeError(f"videos[{place}] is no list of frames")
        checked.append(checked_images(video, f"videos[{place}]"))
    return checked


def checked_question(question: Any, name: str = "question") -> str:
    """The question itself.

    Raises:
        TypeError: no text.
        ValueError: no words.
    """
    if not isinstance(question, str):
        raise TypeError(f"{name} is a {type(question).__name__}, not a text")
    if not question.strip():
        raise ValueError(f"{name}={question!r} has no words")
    return question
