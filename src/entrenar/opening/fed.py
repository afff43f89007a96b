"""A base as an adapter was fed over it: its tokenizer compared with what the adapter's directory remembers."""

import copy
from dataclasses import replace
from pathlib import Path

from transformers import GenerationConfig

from entrenar.core.errors import InputError, listing
from entrenar.core.notices import say_once
from entrenar.data.feed import FEED_NAME, Feed, difference, has_other_text, other_versions, read_feed
from entrenar.data.turn_end import end_ids
from entrenar.files.peft import largest_token
from entrenar.opening.source import ModelSource, with_tokenizer_of


def as_fed(source: ModelSource, adapter: Path) -> ModelSource:
    """The source with the tokenizer that the adapter of a directory was trained with, stopping where it learnt to.

    Raises:
        InputError: the tokenizer makes other ids than in training, as `entrenar_feed.json` remembers, or that file is
            broken; see `with_tokenizer_of`. Without the file nothing is compared.
    """
    source, feed = with_tokenizer_of(source, adapter, largest_token(adapter)), read_feed(adapter)
    if feed is None:
        return source
    _refuse_other_ids(source, feed, adapter)
    if has_other_text(feed, source.tokenizer):
        say_once(
            f"the chat template of {source.path} is not written as the one that {adapter} was trained with "
            f"({FEED_NAME}), though both make the same tokens of its probe: compare them where rows have more than "
            "turns of text, such as tools"
        )
    stops = end_ids(source.tokenizer, source.ends)
    if sorted(feed.stops) != stops:
        say_once(
            f"{adapter} was trained to stop at token {listing(list(map(str, feed.stops)))} and stops so here, where "
            f"{source.path} by itself stops at {listing(list(map(str, stops)))}"
        )
    tokenizer = source.tokenizer
    return replace(source, generation=_stopping_at(source, feed.stops), make_tokenizer=lambda: tokenizer)


def stopping(source: ModelSource) -> GenerationConfig:
    """The source's generation config, made where it has none, with every token that ends an answer: those that it
    states, in its order, the end of sequence and what the chat template ends an answer with."""
    return _stopping_at(source, list(dict.fromkeys([*source.ends, *end_ids(source.tokenizer, source.ends)])))


def _stopping_at(source: ModelSource, stops: list[int]) -> GenerationConfig:
    config = source.config.get_text_config()
    generation = copy.deepcopy(source.generation) or GenerationConfig(
        bos_token_id=getattr(config, "bos_token_id", None), pad_token_id=getattr(config, "pad_token_id", None)
    )
    generation.eos_token_id = stops if len(stops) > 1 else next(iter(stops), None)
    return generation


def _refuse_other_ids(source: ModelSource, feed: Feed, adapter: Path) -> None:
    differing = difference(feed, source.tokenizer)
    if differing is None:
        return
    versions = other_versions(feed)
    cause = f" (trained with {listing(versions)})" if versions else ""
    raise InputError(
        f"the tokenizer of {source.path} makes other tokens than {adapter} was trained on{cause}: {differing}; use the "
        f"model's files and the versions of the training, or train again (without {FEED_NAME} nothing is compared)"
    )
