"""BERT as text encoder, against transformers on one caption at a time."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from src.models import bert
from src.models.bert import BertEncoder, SubwordTokenizer, load_pretrained
from src.models.checkpoint import load_checkpoint, save_checkpoint
from src.utils.errors import UserError
from src.utils.tensors import load_tensors, save_tensors
from tests.tiny_bert import LENGTH, POSITIONS, WORDS, make_model, make_tiny_bert

transformers = pytest.importorskip("transformers")

CAPTIONS = ["A dog chases a man .", "a man", "Things near 3 red things, 4 blue THINGS .", "dog",
            "a zebra", "a red thing near a green thing near a blue thing . " * 3, "zebra", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny BERT."""
    return make_tiny_bert(tmp_path_factory.mktemp("bert"))


def make_encoder(folder: Path, pooling: str = "mean") -> tuple[BertEncoder, SubwordTokenizer]:
    """Return the encoder of a folder in eval mode, and its tokenizer."""
    tokenizer, config = load_pretrained(str(folder), LENGTH)
    encoder = BertEncoder(config, pooling)
    encoder.load_weights(str(folder))
    return encoder.eval(), tokenizer


@pytest.mark.parametrize(("kind", "pooling"), [
    ("bert", "cls"), *((kind, "mean") for kind in bert.MODEL_TYPES)])
def test_features_are_those_of_each_caption_alone(tmp_path, monkeypatch, kind, pooling):
    """Padding, the other captions of a batch and the groups of similar length do not matter."""
    monkeypatch.setattr(bert, "GROUP", 3)
    encoder, tokenizer = make_encoder(make_tiny_bert(tmp_path, kind), pooling)
    # In float64: layer normalization of random weights magnifies the rounding of float32, which
    # differs between processors, to 5e-5.
    encoder = encoder.double()
    network = transformers.AutoModel.from_pretrained(tmp_path).eval().double()
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    with torch.no_grad():
        found = encoder(tokenizer.encode(CAPTIONS))
        assert found.shape == (len(CAPTIONS), 16) and found.dtype == torch.float32
        assert encoder(tokenizer.encode(CAPTIONS)[:0]).shape == (0, 16)  # a rank without captions
        # As on a GPU, where all captions are padded to one length.
        torch.testing.assert_close(encoder._encode(tokenizer.encode(CAPTIONS)), found,
                                   rtol=1e-5, atol=1e-6)
        for caption, features in zip(CAPTIONS, found, strict=True):
            tokens = reference(caption, truncation=True, max_length=LENGTH, return_tensors="pt")
            hidden = network(input_ids=tokens["input_ids"]).last_hidden_state[0]
            expected = hidden.mean(0) if pooling == "mean" else hidden[0]
            torch.testing.assert_close(features, expected.float(), rtol=1e-5, atol=1e-6)
    assert (found[0] - found[1]).abs().max() > 0.01


def test_tokens_are_those_of_transformers(folder):
    """Ids, truncation and padding; the longest caption determines the length."""
    tokenizer, _ = load_pretrained(str(folder), LENGTH)
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    for captions in (CAPTIONS, CAPTIONS[:2], ["dog"]):
        expected = reference(captions, truncation=True, max_length=LENGTH, padding=True)
        assert tokenizer.encode(captions).tolist() == expected["input_ids"]
    assert tokenizer.encode(CAPTIONS[5:6], 20).shape == (1, 20)
    assert tokenizer.encode(CAPTIONS[5:6]).shape == (1, LENGTH)  # the other length was for one call
    assert tokenizer.encode([]).shape[0] == 0
    assert len(tokenizer) == len(WORDS) and tokenizer.pad_id == 0 and tokenizer.unk_id == 1
    assert tokenizer.decode(tokenizer.encode(["A dog chases"])[0]) == "a dog chases"


def test_word_statistics(folder):
    """Lengths without truncation, shares of unknown tokens and of cut captions."""
    tokenizer, _ = load_pretrained(str(folder), LENGTH)
    tokenizer.encode(CAPTIONS)  # its truncation does not last
    rows = [transformers.AutoTokenizer.from_pretrained(folder)(c)["input_ids"] for c in CAPTIONS]
    statistics = tokenizer.word_statistics(CAPTIONS)
    assert statistics.lengths.tolist() == [len(row) for row in rows]
    assert statistics.unknown_share == pytest.approx(
        sum(row.count(1) for row in rows) / sum(map(len, rows)))
    assert statistics.unknown_share > 0
    assert statistics.cut_share == sum(len(row) > LENGTH for row in rows) / len(rows) > 0
    assert tokenizer.word_statistics([]).cut_share == 0


def test_known_words(folder):
    """Special, unknown and padding tokens are no known words."""
    tokenizer, _ = load_pretrained(str(folder), LENGTH)
    known = tokenizer.has_known_word(tokenizer.encode(CAPTIONS))
    assert known.tolist() == [True] * 6 + [False, False]


def test_weights_of_half_precision_are_float32(tmp_path):
    """A folder of float16 weights gives a float32 network with the same numbers."""
    encoder, _ = make_encoder(make_tiny_bert(tmp_path, dtype=torch.float16))
    saved = transformers.AutoModel.from_pretrained(tmp_path).state_dict()
    state = encoder.network.state_dict()
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert state and all(torch.equal(tensor, saved[name].float()) for name, tensor in state.items())
    assert not any("pooler" in name for name in state)  # it would have no gradient


def test_a_checkpoint_needs_no_folder(tmp_path, monkeypatch, capfd):
    """Config and tokenizer are in the file as plain values; nothing is printed or downloaded."""
    model, tokenizer = make_model(make_tiny_bert(tmp_path / "bert"), dropout=0.0)
    save_checkpoint(tmp_path / "model.pth", model, tokenizer, args={})
    expected = model.eval().encode_text(tokenizer.encode(CAPTIONS))
    shutil.rmtree(tmp_path / "bert")

    def refuse(*_, **__):
        raise AssertionError("from_pretrained is called")

    for name in ("AutoConfig", "AutoModel", "AutoTokenizer"):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", refuse)
    capfd.readouterr()
    loaded, its_tokenizer, content = load_checkpoint(tmp_path / "model.pth")
    assert capfd.readouterr() == ("", "")
    assert torch.equal(loaded.encode_text(its_tokenizer.encode(CAPTIONS)), expected)
    assert its_tokenizer.vocab == tokenizer.vocab and isinstance(content["vocab"], str)
    assert {type(value) for value in content["config"].values()} <= {int, float, str, bool}
    assert str(tmp_path) not in json.dumps(content["config"])


def change_config(content: dict, **fields) -> None:
    config = json.loads(content["config"]["text_config"])
    content["config"]["text_config"] = json.dumps({**config, **fields})


@pytest.mark.parametrize(("change", "message"), [
    (lambda c: change_config(c, num_hidden_layers=10**9), "1000000000 layers"),
    (lambda c: change_config(c, hidden_size=10**7), "not of shape"),
    (lambda c: change_config(c, model_type="gpt2"), "gpt2"),
    (lambda c: c["config"].update(text_config="{"), "damaged"),
    (lambda c: c["config"].update(text_pooling="max"), "max"),
    (lambda c: c["config"].update(context_length=POSITIONS + 1), "positions"),
    (lambda c: c.update(vocab="{}"), "tokenizer"),
    (lambda c: c.update(vocab={"a": 0}), "damaged"),
    (lambda c: c.update(vocab=c["vocab"].replace('"pad_id":0', '"pad_id":1')), "padding"),
], ids=["layers", "width", "type", "no JSON", "pooling", "positions", "tokenizer", "words",
        "padding"])
def test_damaged_checkpoints_are_refused(folder, tmp_path, change, message):
    """Each is one message, before memory is allocated for what an untrusted file asks for."""
    model, tokenizer = make_model(folder)
    save_checkpoint(tmp_path / "model.pth", model, tokenizer)
    content = load_tensors(tmp_path / "model.pth")
    change(content)
    save_tensors(tmp_path / "model.pth", content)
    with pytest.raises(UserError, match=message):
        load_checkpoint(tmp_path / "model.pth")


def test_fields_that_name_code_are_ignored(folder):
    """A config of an untrusted file cannot choose code: only the fields of the network count."""
    _, config = load_pretrained(str(folder), LENGTH)
    fields = {"auto_map": {"AutoModel": "x--evil.Model"}, "_attn_implementation": "someone/kernel",
              "attn_implementation": "someone/kernel", "quantization_config": {"bits": 4},
              "_attn_implementation_internal": "someone/kernel", "is_decoder": True}
    plain = BertEncoder(config)
    other = BertEncoder(json.dumps({**json.loads(config), **fields}))
    assert other.network.config.to_dict() == plain.network.config.to_dict()
    assert other.network.config._attn_implementation == plain.network.config._attn_implementation
    assert type(other.network) is type(plain.network) and not other.network.config.is_decoder


def test_a_missing_package_is_one_message(folder, tmp_path, monkeypatch):
    """To start and to load; the message has the command."""
    model, tokenizer = make_model(folder)
    save_checkpoint(tmp_path / "model.pth", model, tokenizer)
    monkeypatch.setitem(sys.modules, "transformers", None)
    for action in (lambda: load_pretrained(str(folder), 8),
                   lambda: load_checkpoint(tmp_path / "model.pth")):
        with pytest.raises(UserError, match="pip install transformers"):
            action()


def test_a_name_that_cannot_be_fetched_is_one_message(monkeypatch, capfd):
    """The message says how to go on without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub.is_offline_mode", lambda: True, raising=False)
    with pytest.raises(UserError, match="--text-weights FOLDER"):
        load_pretrained("someone/no-such-bert", 8)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("break_folder", "message"), [
    (lambda path: shutil.rmtree(path), "no such folder"),
    (lambda path: (path / "config.json").unlink(), "config.json"),
    (lambda path: (path / "config.json").write_text('{"model_type": "gpt2"}'), "gpt2"),
    (lambda path: (path / "model.safetensors").unlink(), "model.safetensors"),
    (lambda path: (path / "model.safetensors").write_bytes(b"no weights"), "cannot be loaded"),
    (lambda path: (path / "tokenizer.json").write_text("{}"), "cannot be loaded"),
], ids=["folder", "config", "type", "no weights", "damaged weights", "tokenizer"])
def test_folders_that_cannot_be_used(tmp_path, break_folder, message):
    """Each is one message that names the folder."""
    folder = make_tiny_bert(tmp_path / "bert")
    break_folder(folder)
    with pytest.raises(UserError, match=message) as error:
        make_encoder(folder)
    assert str(folder) in str(error.value)


def test_weights_of_another_network_are_refused(tmp_path):
    """Random numbers in place of missing weights would not be noticed."""
    folder = make_tiny_bert(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(UserError, match="tensors are missing, e.g. encoder.layer.2"):
        make_encoder(folder)


def test_a_context_that_is_too_long_is_refused(folder):
    """BERT has a number of positions."""
    load_pretrained(str(folder), POSITIONS)
    with pytest.raises(UserError, match=f"--context-length {POSITIONS + 1}"):
        load_pretrained(str(folder), POSITIONS + 1)
