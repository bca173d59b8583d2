"""A text as a query: shares that sum to the score, unknown words named."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from src.errors import UserError
from src.model import DualEncoder, ModelConfig
from src.query import embed_queries, spelling_hints
from src.tokenizer import Tokenizer

QUERIES = ["a red circle", "red", "red red red circle", "a zebra on a circle", "A RED, circle!",
           " ".join(["circle"] * 50)]


@pytest.fixture(scope="module")
def towers() -> tuple[DualEncoder, Tokenizer]:
    """A model with random weights and a small vocabulary."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_captions(["a red circle on a blue square"], 1, 8)
    return DualEncoder(ModelConfig(len(tokenizer), image_size=32, context_length=8)).eval(), \
        tokenizer


def test_shares_sum_to_the_score(towers: tuple[DualEncoder, Tokenizer]) -> None:
    """For every query and photo the words' shares add up to the dot product of the embeddings."""
    model, tokenizer = towers
    photos = F.normalize(torch.randn(20, 256), dim=1)
    for query in embed_queries(model, tokenizer, QUERIES):
        shares = query.shares(photos)
        assert shares.shape == (20, len(query.words))
        torch.testing.assert_close(shares.sum(1), photos @ query.embedding, atol=2e-6, rtol=0)


def test_embedding_is_the_models(towers: tuple[DualEncoder, Tokenizer]) -> None:
    """A query's embedding is encode_text of its tokens, alone or among others."""
    model, tokenizer = towers
    for query in embed_queries(model, tokenizer, QUERIES):
        with torch.no_grad():
            alone = model.encode_text(tokenizer.encode([query.text]))[0]
        torch.testing.assert_close(query.embedding, alone)


def test_words_past_the_context_length_do_not_count(
    towers: tuple[DualEncoder, Tokenizer],
) -> None:
    """Only as many words as the model reads are listed."""
    (query,) = embed_queries(*towers, [QUERIES[-1]])
    assert query.words == ["circle"] * 8


def test_unknown_words_are_named_once_in_order(towers: tuple[DualEncoder, Tokenizer]) -> None:
    """Words outside the vocabulary are listed, known ones are not."""
    (query,) = embed_queries(*towers, ["zebra on a cirle zebra"])
    assert query.unknown == ["zebra", "cirle"]
    assert spelling_hints(query.unknown, towers[1]) == [
        "'zebra' is not in the vocabulary",
        "'cirle' is not in the vocabulary, near it: circle",
    ]


@pytest.mark.parametrize("text", ["", "   ", "zebra", "?!", "zebra lion", "\u4e00"])
def test_a_query_without_a_known_word_is_an_error(
    towers: tuple[DualEncoder, Tokenizer], text: str
) -> None:
    """No random ranking: the message shows the text and, where there are some, near spellings."""
    with pytest.raises(UserError, match="no word of"):
        embed_queries(*towers, [text])
