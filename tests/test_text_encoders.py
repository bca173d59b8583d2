"""The benchmark of text encoders: pairs of captions, ties, and a run on tiny features."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import text_encoders
from benchmarks.text_encoders import Features, OrderPair, order_pairs, word_order
from src.data.captions import ImageRecord
from src.models.dual_encoder import DualEncoder, ModelConfig
from src.models.tokenizer import Tokenizer
from src.utils.errors import UserError

SWAPS = {
    "A dog chases a man .": "A man chases a dog .",
    "Two dogs run past the children .": "Two children run past the dogs .",
    "Black dog on green grass": "Green dog on black grass",
    "A man in a blue hat and a black coat .": "A man in a black hat and a blue coat .",
}
UNUSED = ["A boy and a girl run .", "a man , a woman", "A black and white dog .", "A man runs .",
          "A man and a man .", "A man chases two dogs .", "A man , a dog and a cat .",
          "A black dog , a white dog and a brown dog .", "a mandolin chases a dog", ""]


def test_words_are_swapped() -> None:
    """Two different words of a kind and number; not where both orders are right."""
    records = [ImageRecord(str(i), (caption,)) for i, caption in enumerate([*SWAPS, *UNUSED])]
    pairs = order_pairs(records)
    assert {pair.caption: pair.swapped for pair in pairs} == SWAPS
    for pair in pairs:
        assert records[pair.image].captions == (pair.caption,)
        assert sorted(pair.caption.lower().split()) == sorted(pair.swapped.lower().split())
    assert [pair.kind for pair in pairs].count("people") == 2


def test_one_caption_of_an_image_and_as_many_of_each_kind() -> None:
    """Where there are enough; otherwise more of the other kind."""
    people, colors = list(SWAPS)[:2], list(SWAPS)[2:]
    records = [ImageRecord(str(i), (*people, *colors)) for i in range(9)]
    assert len(order_pairs(records, 100)) == 18
    kinds = [pair.kind for pair in order_pairs(records, 6)]
    assert kinds.count("people") == kinds.count("colors") == 3
    few = [ImageRecord("0", (people[0],)), *(ImageRecord(str(i), (colors[0],)) for i in range(9))]
    kinds = [pair.kind for pair in order_pairs(few, 6)]
    assert (kinds.count("people"), kinds.count("colors")) == (1, 5)


class Ordered(torch.nn.Module):
    """A model that embeds a caption as the first id of a row, as a direction."""

    def __init__(self) -> None:
        super().__init__()
        self.config = ModelConfig(10)
        self.logit_scale = torch.zeros(())

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(tokens[:, 0], 10).float()


def test_word_order_counts_wins_and_ties() -> None:
    """Wins in percent of each kind, a tie half; with another image they can differ."""
    tokenizer = Tokenizer.from_captions(["dog man red blue"], 1, 4)
    images = torch.nn.functional.one_hot(
        torch.tensor([tokenizer.vocab[w] for w in ("dog", "man", "red", "dog")]), 10).float()
    pairs = [OrderPair("dog man", "man dog", 0, "people"),   # wins; with image 1 it loses
             OrderPair("dog man", "man dog", 1, "people"),   # loses
             OrderPair("red blue", "blue red", 3, "colors"),  # a tie
             OrderPair("red blue", "blue red", 2, "colors")]  # wins
    found = word_order(Ordered(), tokenizer, images, pairs)
    assert found == {"order_people": 50.0, "order_colors": 75.0, "ties": 25.0,
                     "order_other": pytest.approx(100 * (0.5 + 1 + 0.5 + 0.5) / 4)}


def test_a_bag_of_words_ties() -> None:
    """The sum of the same words in another order differs by rounding at most."""
    tokenizer = Tokenizer.from_captions([*SWAPS], 1, 16)
    torch.manual_seed(0)
    model = DualEncoder(ModelConfig(len(tokenizer), image_size=32)).eval()
    pairs = order_pairs([ImageRecord(str(i), (c,)) for i, c in enumerate(SWAPS)])
    images = torch.nn.functional.normalize(torch.randn(4, 256))
    found = word_order(model, tokenizer, images, pairs)
    assert found["ties"] == 100 and found["order_people"] == found["order_other"] == 50


def tiny_features(path: Path) -> Path:
    """Write features of 12 images of each split with two captions."""
    captions = list(SWAPS)
    records = {split: [ImageRecord(f"{split}{i}", (captions[i % 4], f"a {captions[i % 4]}"))
                       for i in range(12)] for split in ("train", "val")}
    torch.manual_seed(0)
    Features(records, {split: torch.randn(12, 1280) for split in records}, {}).save(path)
    return path


def test_features_are_stored_as_float16(tmp_path: Path) -> None:
    """Captions and features come back, and a missing file is one message."""
    data = Features.load(tiny_features(tmp_path / "features.npz"))
    assert data.images["val"].dtype == torch.float32 and data.records["train"][1].captions
    torch.manual_seed(0)
    assert torch.equal(data.images["train"], torch.randn(12, 1280).half().float())
    with pytest.raises(UserError, match="--images"):
        text_encoders.main(["--features", str(tmp_path / "no.npz")])


def test_every_row_runs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """One epoch of each text encoder; runs in the file are not repeated."""
    pytest.importorskip("transformers")
    from tests.tiny_bert import make_tiny_bert

    bert = make_tiny_bert(tmp_path / "bert", dtype=torch.float16)
    # The benchmark's context length needs as many positions.
    config = json.loads((bert / "config.json").read_text())
    assert config["max_position_embeddings"] < text_encoders.CONTEXT_LENGTH
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_encoders, "CONTEXT_LENGTH", 12)
        command = ["--features", str(tiny_features(tmp_path / "features.npz")), "--text-weights",
                   str(bert), "--rows", "words", "frozen", "tuned", "scratch", "--seeds", "1",
                   "--epochs", "1", "--device", "cpu", "--runs", str(tmp_path / "runs.jsonl")]
        assert text_encoders.main(command) == 0
        lines = capsys.readouterr().out.splitlines()[-4:]
        assert [line.split(" | ")[0] for line in lines] == [
            "| bag of words", "| BERT frozen", "| BERT tuned",
            "| the same network from random weights"]
        patch.setattr(text_encoders, "train_row", None)
        assert text_encoders.main(command) == 0
        assert capsys.readouterr().out.splitlines()[-4:] == lines
    runs = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [run["name"] for run in runs] == ["words", "frozen", "tuned", "scratch"]
    assert runs[0]["metrics"]["ties"] == 100
