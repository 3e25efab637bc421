"""Texts become tokens in one way, whatever was saved with the tokenizer, and the answer's first token is found."""

from __future__ import annotations

import json
import shutil

import pytest
import transformers
from conftest import make_tokenizer, mergekit_yaml

from mergekit_slta import Alphas
from mergekit_slta.data.tokens import encode

TEXT = "the quick brown fox jumps over a lazy dog while 12 + 30 = 42 and so on"
TRUNCATION = {"direction": "Left", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
    "pad_token": "<s>",
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def test_special_tokens_are_not_doubled(tokenizer):
    """The tokenizer's own <s> is added once, whether or not the text brings one."""
    plain = encode("the fox", tokenizer, 99, add_special_tokens=True).ids
    assert plain[0] == 0
    assert plain.count(0) == 1
    assert encode("<s>the fox", tokenizer, 99, add_special_tokens=True).ids == plain


def test_a_token_across_the_border_belongs_to_the_answer(tokenizer):
    """Some tokenizers join a header's line break with what follows: offsets tell, token counts of the prompt do not."""
    text = "the quick brown fox"
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    for start in range(1, len(text)):
        first = encode(text, tokenizer, 99, add_special_tokens=True, answer=start).completion
        assert offsets[first][1] > start
        assert first == 1 or offsets[first - 1][1] <= start


@pytest.mark.parametrize("length", [10, 99])
@pytest.mark.parametrize(
    "saved",
    [
        {"truncation_side": "left"},
        {"padding_side": "left", "pad_token": "<s>", "max_length": 64, "padding": "max_length"},
        {"model_max_length": 8},
        {"max_length": 8, "truncation": True, "stride": 2},
        {"split_special_tokens": True},
        {"tokenizer.json": {"truncation": TRUNCATION}},
        {"tokenizer.json": {"truncation": TRUNCATION, "padding": PADDING}},
    ],
    ids=repr,
)
def test_saved_state_does_not_act(tmp_path, tokenizer, saved, length, caplog, capfd):
    """A row is tokenized whole and cut at its end; truncation, padding and sides that were saved change nothing."""
    tokenizer.save_pretrained(tmp_path)
    for name in ("tokenizer_config.json", "tokenizer.json"):
        changes = saved.get(name, saved if name == "tokenizer_config.json" and "tokenizer.json" not in saved else {})
        content = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps(content | changes))
    other = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = f"<s>{TEXT}</s>"
    for answer in (0, text.index("lazy")):
        expected = encode(text, tokenizer, length, add_special_tokens=False, answer=answer)
        assert encode(text, other, length, add_special_tokens=False, answer=answer) == expected
    whole = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    assert expected.ids == tuple(whole[:length])
    assert whole[-1] == 1  # </s> is one token
    assert "longer than" not in caplog.text + capfd.readouterr().err


@pytest.mark.parametrize("parameters", [{}, {"objective": "joint", "steps": 0, "granularity": "attn_mlp"}], ids=repr)
def test_alphas_do_not_depend_on_saved_state(tiny, write_recipe, tmp_path, parameters):
    """Through the stock command: rows longer than `max_seq_length`, cut at their end, whose answers lie early."""
    recipe = tiny.recipe_with_answers(max_seq_length=12, **parameters)
    assert mergekit_yaml(write_recipe(recipe), tmp_path / "plain").exit_code == 0
    shutil.copytree(tiny.base, tmp_path / "base")
    saved = {
        "tokenizer_config.json": {"truncation_side": "left", "padding_side": "left"},
        "tokenizer.json": {"truncation": {**TRUNCATION, "max_length": 8}, "padding": PADDING},
    }
    for name, changes in saved.items():
        path = tmp_path / "base" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    recipe["base_model"] = str(tmp_path / "base")
    assert mergekit_yaml(write_recipe(recipe), tmp_path / "other").exit_code == 0
    plain, other = (Alphas.load(tmp_path / name / "slta_alphas.json") for name in ("plain", "other"))
    assert [entry.alpha for entry in plain.submodules] == [entry.alpha for entry in other.submodules]
    assert [task["sha256"] for task in plain.calibration["tasks"]] == [
        task["sha256"] for task in other.calibration["tasks"]
    ]


def test_the_end_of_a_text_is_what_a_cut_drops(tokenizer):
    """A tokenizer that ends every text with </s>: the token is the end of a whole row, and no cut row has it."""
    ending = make_tokenizer()
    ending._tokenizer.post_processor = type(ending._tokenizer.post_processor)(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    whole = encode(TEXT, tokenizer, 99, add_special_tokens=True).ids
    assert encode(TEXT, ending, 99, add_special_tokens=True).ids == (*whole, 1)
    assert encode(TEXT, ending, 9, add_special_tokens=True).ids == whole[:9]


class _Words(transformers.PreTrainedTokenizer):
    """A tokenizer in plain Python, which knows no offsets: one token a word."""

    def __init__(self, **options):
        self.words = ["<s>", *dict.fromkeys(TEXT.split())]
        super().__init__(bos_token="<s>", **options)

    vocab_size = property(lambda self: len(self.words))

    def get_vocab(self):
        return {word: number for number, word in enumerate(self.words)}

    def _tokenize(self, text):
        return text.split()

    def _convert_token_to_id(self, token):
        return self.words.index(token)

    def _convert_id_to_token(self, index):
        return self.words[index]

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        return [0, *token_ids_0]


@pytest.mark.parametrize("saved", [{}, {"truncation_side": "left", "model_max_length": 4}], ids=repr)
def test_a_tokenizer_without_offsets(saved):
    """The answer begins where row and prompt differ; saved state does not act here either."""
    words = _Words(**saved)
    start = TEXT.index("lazy")
    number = TEXT.split().index("lazy")
    ids, first, num_cut = encode(TEXT, words, 99, add_special_tokens=True, answer=start)
    assert ids == (0, *words.convert_tokens_to_ids(TEXT.split()))
    assert first == 1 + number
    assert encode(TEXT, words, 4, add_special_tokens=True, answer=start) == (ids[:4], 4, len(ids) - 4)
    assert num_cut == 0
