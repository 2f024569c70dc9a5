"""A page in the browser: a document and a question, answered with the full cache and with a compressed one.

    python examples/demo.py
    python examples/demo.py --model Qwen/Qwen2.5-VL-7B-Instruct --device cuda --port 7860

Both answers appear word by word, side by side and one after the other, so that each has the machine to itself. Below
them stand the time per token, the bytes of both caches, and what the compressed one kept of the page. Without `--model`
the small Qwen2.5-VL of this repository answers; it reads the sample documents. Needs `pip install "mmshiftkv[demo]"`.
"""

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import (
    ASSETS,
    METHOD_NAMES,
    errors_in_one_line,
    model_arguments,
    needs_checkpoint,
    needs_package,
    positive_integer,
    sample_documents,
    script_parser,
)

if TYPE_CHECKING:
    from mmshiftkv import Conversation

VALUE_AWARE = "value-aware"
METHODS = {
    "ShiftKV, value-aware": VALUE_AWARE,
    **{name: key for key, name in METHOD_NAMES.items() if key != "full"},
}
HEADER = ["cache", "ms per token", "tokens kept", "size"]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The checked arguments."""
    parser = script_parser(__doc__, model_arguments())
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    parser.add_argument("--port", type=positive_integer, help="default: the first free one from 7860")
    return parser.parse_args(argv)


class Clock:
    """A logits processor that changes nothing and knows when each token came."""

    def __init__(self) -> None:
        self._times: list[float] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Reads the clock."""
        self._times.append(time.perf_counter())
        return scores

    @property
    def milliseconds(self) -> str:
        """The median time of a token after the first; compiling and the prefill are none of it."""
        gaps = [1e3 * (later - earlier) for earlier, later in zip(self._times, self._times[1:], strict=False)]
        return f"{statistics.median(gaps):.1f}" if gaps else "-"


class Demo:
    """What the page asks for.

    Args:
        model: the model that answers.
        processor: that of the model.
        max_new_tokens: of an answer.
    """

    def __init__(self, model: Any, processor: Any, max_new_tokens: int) -> None:
        self._model, self._processor, self._max_new_tokens = model, processor, max_new_tokens

    def compare(
        self, picture: Any, question: str, budget: float, method: str
    ) -> Iterator[tuple[str, str, list[list[str]], Any]]:
        """Both answers so far, the rows of the table so far, and at the end the picture of what was kept."""
        import gradio

        try:
            yield from self._compare(picture, question, int(budget), METHODS[method])
        except (KeyError, TypeError, ValueError) as error:
            raise gradio.Error(str(error), print_exception=False) from error

    def _compare(
        self, picture: Any, question: str, budget: int, method: str
    ) -> Iterator[tuple[str, str, list[list[str]], Any]]:
        if picture is None:
            raise ValueError("There is no image yet: upload one, or choose a sample.")
        rows: list[list[str]] = []
        full = ""
        # A budget that keeps the whole prompt is the full cache, bit by bit.
        whole, clock = self._conversation(1.0, "shiftkv"), Clock()
        for full in self._answer(whole, question, picture, clock):
            yield full, "", rows, None
        rows.append(["full", clock.milliseconds, *_size(whole)])
        small, clock, answer = self._conversation(budget, method), Clock(), ""
        for answer in self._answer(small, question, picture, clock):
            yield full, answer, rows, None
        rows.append([f"budget {budget}", clock.milliseconds, *_size(small)])
        yield full, answer, rows, self._heat_map(small, question, picture)

    def _conversation(self, budget: int | float, method: str) -> "Conversation":
        from mmshiftkv import Conversation

        settings = {"preset": VALUE_AWARE} if method == VALUE_AWARE else {}
        return Conversation(
            self._model,
            self._processor,
            budget=budget,
            method="shiftkv" if settings else method,
            cache_settings=settings,
            max_new_tokens=self._max_new_tokens,
            do_sample=False,
        )

    def _answer(self, chat: "Conversation", question: str, picture: Any, clock: Clock) -> Iterator[str]:
        """The answer so far, again and again."""
        stream = chat.ask(question, images=[picture], stream=True, logits_processor=[clock])
        text = ""
        try:
            for piece in stream:
                text += piece
                yield text
        except GeneratorExit:  # the page was closed
            stream.close()
            raise

    def _heat_map(self, chat: "Conversation", question: str, picture: Any) -> Any:
        from mmshiftkv import draw_heatmap, visual_token_map
        from tiny_vlm.answering import build_inputs

        inputs = build_inputs(self._processor, [picture], [question])
        try:
            token_map = visual_token_map(self._model, inputs, chat.cache)
        except TypeError:  # it knows where the tokens of some families lie, not of all
            return None
        return draw_heatmap(token_map, picture, tokenizer=self._processor.tokenizer)


def _size(chat: "Conversation") -> tuple[str, str]:
    """Tokens of the prompt that a cache keeps, and the bytes of all that it holds, without empty slots."""
    from mmshiftkv.report import format_bytes

    report = chat.report()
    kept = chat.cache.kept_indices(next(layer.index for layer in report.layers if layer.selected))
    assert kept is not None
    return str(kept.shape[-1]), format_bytes(report.bytes_stored - report.bytes_reserved)


def build_page(demo: Demo) -> Any:
    """The page, ready to be launched."""
    import gradio

    samples = [[str(ASSETS / name), questions[0]["question"]] for name, questions in sample_documents().items()]
    with gradio.Blocks(title="mmshiftkv", analytics_enabled=False) as page:
        gradio.Markdown("# One document, two caches\nThe full KV cache, and one that compressed itself while reading.")
        with gradio.Row():
            with gradio.Column(scale=1):
                picture = gradio.Image(type="pil", label="document")
                question = gradio.Textbox(label="question", placeholder="What is the total?")
                budget = gradio.Slider(8, 512, value=64, step=8, label="budget: tokens kept per layer and head")
                method = gradio.Dropdown(list(METHODS), value=next(iter(METHODS)), label="method")
                button = gradio.Button("Ask", variant="primary")
                gradio.Examples(samples, [picture, question])
            with gradio.Column(scale=2):
                with gradio.Row():
                    full = gradio.Textbox(label="full cache", lines=4)
                    compressed = gradio.Textbox(label="compressed cache", lines=4)
                table = gradio.Dataframe(headers=HEADER, label="time and memory", interactive=False)
                # Its label would lie on the picture's own heading.
                heat_map = gradio.Plot(label="what was kept", show_label=False)
        given, shown = [picture, question, budget, method], [full, compressed, table, heat_map]
        for event in (button.click, question.submit):
            event(demo.compare, given, shown, api_name="compare" if event == button.click else False)
    return page.queue(default_concurrency_limit=1, max_size=16)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script with these arguments, or with those of the command line."""
    arguments = parse_arguments(argv)
    with errors_in_one_line():
        needs_package("PIL", "vision")
        needs_package("matplotlib", "plot")
        needs_package("gradio", "demo")
        needs_checkpoint(arguments.model)
        from tiny_vlm.answering import load

        model, processor = load(arguments.model, arguments.device, arguments.dtype)
    page = build_page(Demo(model, processor, arguments.max_new_tokens))
    page.launch(server_name=arguments.host, server_port=arguments.port, allowed_paths=[str(Path(ASSETS))])


if __name__ == "__main__":
    main()
