"""Several caches of one model: deep copies, caches that take turns, caches in threads."""

import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import torch
from transformers import PreTrainedModel

import models
from mmshiftkv import CACHE_ARGUMENT, ShiftKVCache

from .bench import Bench, Prompts, Settings, TextModel, draw_budget, draw_score, tokens_kept
from .case import Case, Draws, Outcome
from .checks import check_kept, check_lengths, compare_generations, full_cache, kept_by_layer, run_pass
from .chunks import chunked_settings


def state_of(cache: Any) -> list[Any]:
    """Copies of all that a cache holds."""
    held: list[Any] = [int(cache.get_seq_length())]
    for index, layer in enumerate(cache.layers):
        kept = cache.kept_indices(index)
        stored = layer.stored if hasattr(layer, "stored") else None
        parts = [None if layer.keys is None else part[:, :, :stored].clone() for part in (layer.keys, layer.values)]
        held.append((stored, kept if kept is None else kept.clone(), *parts))
    return held


def assert_same_state(found: Sequence[Any], expected: Sequence[Any], what: str) -> None:
    """Two results of `state_of` are equal to the bit."""
    assert found[0] == expected[0], f"{what}: {found[0]} tokens seen, not {expected[0]}"
    for index, (mine, theirs) in enumerate(zip(found[1:], expected[1:], strict=True)):
        assert mine[0] == theirs[0], f"{what}: layer {index} holds {mine[0]} tokens, not {theirs[0]}"
        for one, other in zip(mine[1:], theirs[1:], strict=True):
            same = one is other is None or (one is not None and other is not None and one.equal(other))
            assert same, f"{what}: layer {index} holds other numbers"


@dataclass(frozen=True)
class Copies(Case):
    """A deep copy goes on as its original would have, and neither changes the other.

    Attributes:
        sizes: tokens of the passes that hold the prompt.
        copied: after how many of these passes the cache is copied.
        tokens: fed one by one behind the prompt.
        again: the copy is copied once more.
        room: `max_new_tokens` of the cache.
        score: settings of ShiftKV that say what scores count, and whether values are refitted.
    """

    model: TextModel
    prompts: Prompts
    budget: int | float
    sizes: tuple[int, ...]
    copied: int
    tokens: int
    again: bool
    room: int | None
    score: Settings

    @classmethod
    def draw(cls, draws: Draws) -> Self:
        model, prompts = TextModel.draw(draws), Prompts.draw(draws, shortest=4)
        sizes = (prompts.width,)
        if draws.is_rare(0.4):
            first = draws.randint(1, prompts.width - 1)
            sizes = (first, prompts.width - first)
        room = draws.one_of(None, 2, 12)
        budget, copied = draw_budget(draws, prompts.width), draws.randint(0, len(sizes))
        tokens, again = draws.randint(1, 6), draws.is_rare(0.3)
        return cls(model, prompts, budget, sizes, copied, tokens, again, room, draw_score(draws))

    def run(self, bench: Bench) -> Outcome:
        model, inputs = bench.text(self.model), self.prompts.inputs(bench.device)
        own = chunked_settings("single" if len(self.sizes) == 1 else "told", self.prompts.width, self.room)
        whole, original = (ShiftKVCache(model, budget=self.budget, **own, **dict(self.score)) for _ in range(2))
        self._feed(model, whole, inputs, range(self.copied))
        self._feed(model, original, inputs, range(self.copied))
        before = state_of(original)
        twin = copy.deepcopy(original)
        if self.again:
            twin = copy.deepcopy(twin)
        assert_same_state(state_of(twin), before, "the copy")
        rest = range(self.copied, len(self.sizes) + self.tokens)
        expected = self._feed(model, whole, inputs, rest)
        found = self._feed(model, twin, inputs, rest)
        assert_same_state(state_of(original), before, "the original after its copy went on")
        later = state_of(twin)
        late = self._feed(model, original, inputs, rest)
        assert_same_state(state_of(twin), later, "the copy after its original went on")
        for mine, other, theirs in zip(found, late, expected, strict=True):
            assert mine.equal(theirs), "the copy gives other logits"
            assert other.equal(theirs), "the original gives other logits"
        check_kept(twin, inputs["attention_mask"], self.budget)
        seen = self.prompts.width + self.tokens
        check_lengths(twin, seen, tokens_kept(self.budget, self.prompts.width) + self.tokens)
        return Outcome.PASSED

    def _feed(
        self, model: PreTrainedModel, cache: Any, inputs: dict[str, torch.Tensor], numbers: range
    ) -> list[torch.Tensor]:
        """Runs these passes: those of the prompt first, then one for each token."""
        tokens = models.prompt_ids(len(self.prompts.lengths), self.tokens, seed=1).to(model.device)
        ids = torch.cat([inputs["input_ids"], tokens], dim=1)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], dim=1)
        ends = torch.tensor([*self.sizes, *[1] * self.tokens]).cumsum(0).tolist()
        starts = [0, *ends]
        return [run_pass(model, cache, ids[:, starts[n] : ends[n]], mask[:, : ends[n]]) for n in numbers]


@dataclass(frozen=True)
class Conversation:
    """A prompt that is answered greedily, with a cache of its own.

    Attributes:
        full: with the full cache.
        room: `max_new_tokens` of the cache.
        new_tokens: of the answer.
        score: settings of ShiftKV that say what scores count, and whether values are refitted.
    """

    prompts: Prompts
    budget: int | float
    full: bool
    room: int | None
    new_tokens: int
    score: Settings

    @classmethod
    def draw(cls, draws: Draws) -> Self:
        """Any prompt and budget."""
        prompts = Prompts.draw(draws, rows=2, longest=50)
        room = draws.one_of(None, None, draws.randint(1, 10))
        budget, full, new_tokens = draw_budget(draws, prompts.width), draws.is_rare(0.2), draws.randint(2, 6)
        return cls(prompts, budget, full, room, new_tokens, draw_score(draws))

    def cache(self, model: PreTrainedModel) -> Any:
        """A new cache for it."""
        if self.full:
            return full_cache(model)
        return ShiftKVCache(model, budget=self.budget, max_new_tokens=self.room, **dict(self.score))

    def answer(self, model: PreTrainedModel, cache: Any) -> Any:
        """What `generate` gives."""
        inputs = self.prompts.inputs(model.device)
        return model.generate(
            **inputs,
            **{CACHE_ARGUMENT: cache},
            max_new_tokens=self.new_tokens,
            do_sample=False,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
            output_scores=True,
            disable_compile=True,
        )


@dataclass(frozen=True)
class Interleaved(Case):
    """Caches of one model that take turns, pass by pass, are as each by itself.

    Attributes:
        conversations: what each cache is for.
        order: the cache whose turn it is; its first turn is its prompt, each later one a token.
    """

    model: TextModel
    conversations: tuple[Conversation, ...]
    order: tuple[int, ...]

    @classmethod
    def draw(cls, draws: Draws) -> Self:
        conversations = tuple(Conversation.draw(draws) for _ in range(draws.randint(2, 4)))
        order = [index for index in range(len(conversations)) for _ in range(draws.randint(1, 6))]
        draws.shuffle(order)
        return cls(TextModel.draw(draws), conversations, tuple(order))

    def run(self, bench: Bench) -> Outcome:
        model = bench.text(self.model)
        caches = [conversation.cache(model) for conversation in self.conversations]
        for cache in caches[::2]:
            cache.get_mask_sizes(7, 0)  # as if a pass began that another one overtakes
        together = self._run(model, caches, self.order)
        for index, conversation in enumerate(self.conversations):
            alone = conversation.cache(model)
            expected = self._run(model, {index: alone}, [number for number in self.order if number == index])
            assert all(mine.equal(theirs) for mine, theirs in zip(together[index], expected[index], strict=True))
            if not conversation.full:
                assert_same_state(state_of(caches[index]), state_of(alone), f"cache {index}")
        return Outcome.PASSED

    def _run(self, model: PreTrainedModel, caches: Any, order: Sequence[int]) -> dict[int, list[torch.Tensor]]:
        logits: dict[int, list[torch.Tensor]] = {index: [] for index in order}
        masks: dict[int, torch.Tensor] = {}
        for index in order:
            if index not in masks:
                inputs = self.conversations[index].prompts.inputs(model.device)
                ids, masks[index] = inputs["input_ids"], inputs["attention_mask"]
            else:
                ids = models.prompt_ids(masks[index].shape[0], 1, seed=masks[index].shape[1]).to(model.device)
                masks[index] = torch.cat([masks[index], torch.ones_like(ids)], dim=1)
            logits[index].append(run_pass(model, caches[index], ids, masks[index]))
        return logits


@dataclass(frozen=True)
class Threads(Case):
    """Caches of one model in several threads are as each by itself.

    Attributes:
        conversations: one for each thread.
        times: how often each is run.
    """

    model: TextModel
    conversations: tuple[Conversation, ...]
    times: int

    @classmethod
    def draw(cls, draws: Draws) -> Self:
        conversations = tuple(Conversation.draw(draws) for _ in range(draws.randint(2, 4)))
        return cls(TextModel.draw(draws), conversations, draws.randint(1, 3))

    def run(self, bench: Bench) -> Outcome:
        model = bench.text(self.model)
        expected = []
        for conversation in self.conversations:
            cache = conversation.cache(model)
            expected.append((conversation.answer(model, cache), cache))
        with ThreadPoolExecutor(len(self.conversations)) as pool:
            runs = [pool.submit(self._run, model, conversation) for conversation in self.conversations]
            results = [run.result() for run in runs]
        outcome = Outcome.PASSED
        for conversation, found, (answer, alone) in zip(self.conversations, results, expected, strict=True):
            for mine, cache in found:
                outcome |= compare_generations(mine, answer, conversation.prompts.width, exact=True)
                if not conversation.full:
                    kept, theirs = kept_by_layer(cache), kept_by_layer(alone)
                    assert all(kept[index] is theirs[index] or kept[index].equal(theirs[index]) for index in kept)
        return outcome

    def _run(self, model: PreTrainedModel, conversation: Conversation) -> list[tuple[Any, Any]]:
        found = []
        for _ in range(self.times):
            cache = conversation.cache(model)
            found.append((conversation.answer(model, cache), cache))
        return found
