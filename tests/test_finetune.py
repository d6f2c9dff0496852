"""Fine-tuning: texts, prompts, the cut model, what trains, each method and the command, on random models."""

import csv
import dataclasses
import importlib.util
import io
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import jetplane as jp
from jetplane import cli
from jetplane.errors import ArgumentError, DataError, MissingPackageError, RunFolderError
from jetplane.experiments.finetune import command, comparison, language_model, methods, parameters, texts
from jetplane.experiments.finetune.classifier import TextClassifier
from jetplane.experiments.finetune.frozen import cached_states
from jetplane.experiments.finetune.options import METHODS, Settings, Source
from jetplane.experiments.finetune.preparing import prepare
from jetplane.experiments.finetune.texts import Example
from jetplane.experiments.finetune.training import accuracy, run

transformers = pytest.importorskip("transformers", reason="needs pip install '.[frameworks]'")
tokenizers = pytest.importorskip("tokenizers")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of TensorBoard's dependencies
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]

WEATHER = {"sun": ("warm", "bright", "dry", "clear"), "rain": ("wet", "grey", "cold", "dark")}
PLACES = ("garden", "street", "harbour", "valley", "market", "forest", "village", "station")
LABELLED = [
    Example(label, f"the {place} was {word} and {other} today")
    for label, words in WEATHER.items()
    for place in PLACES
    for word, other in itertools.permutations(words, 2)
]
KINDS = ("llama", "gpt2", "bert")


def write_model(kind: str, folder):
    """A random model with a tokenizer of whole words, as `save_pretrained` writes both."""
    words = sorted({word for example in LABELLED for word in example.text.split()})
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "Topic", ":", "sun", "rain", "storm", *words])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[UNK]"
    ).save_pretrained(folder)
    size = len(vocabulary)
    torch.manual_seed(0)
    if kind == "llama":
        config = transformers.LlamaConfig(
            vocab_size=size, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, pad_token_id=0, initializer_range=0.3,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    elif kind == "gpt2":
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=size, n_embd=32, n_layer=3, n_head=4, n_positions=32)
        )
    else:
        config = transformers.BertConfig(
            vocab_size=size, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            initializer_range=0.3,
        )  # fmt: skip
        model = transformers.BertModel(config, add_pooling_layer=False)
    model.save_pretrained(folder)
    return folder


def write_texts(path, examples=LABELLED):
    path.write_text("label,text\n" + "".join(f"{e.label},{e.text}\n" for e in examples))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune")
    for kind in KINDS:
        write_model(kind, folder / kind)
    write_texts(folder / "weather.csv")
    return folder


def prepared(folder, kind: str = "llama", **settings):
    return prepare(
        Source(
            folder / kind, folder / "weather.csv", sizes=(96, 32, 64), tokens=24, cache=folder / "states", **settings
        )
    )


class TestTexts:
    def test_formats_hold_the_same(self, tmp_path):
        few = LABELLED[:3] + LABELLED[-3:]
        csv = write_texts(tmp_path / "a.csv", few)
        tab = tmp_path / "a.tab"
        tab.write_text("Category\tText\nd\tstring\nclass\t\n" + "".join(f"{e.label}\t{e.text}\n" for e in few))
        lines = tmp_path / "a.jsonl"
        lines.write_text("".join(json.dumps({"topic": e.label, "content": e.text}) + "\n" for e in few))
        for n, example in enumerate(few):
            (tmp_path / "f" / example.label).mkdir(parents=True, exist_ok=True)
            (tmp_path / "f" / example.label / f"{n}.txt").write_text(example.text)
        assert texts.read(csv) == texts.read(tab) == texts.read(lines) == few
        assert sorted(texts.read(tmp_path / "f"), key=str) == sorted(few, key=str)

    def test_columns_can_be_named(self, tmp_path):
        path = tmp_path / "a.csv"
        path.write_text("text,mood,body\nno,good,yes\n")
        assert texts.read(path, "body", "mood") == [Example("good", "yes")]

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("gone.csv", None, "no such file"),
            ("a.doc", "x", "ends in one of"),
            ("a.csv", "", "is empty"),
            ("a.csv", "label,words\na,b\n", "no column text.*it has label, words.*--text-column"),
            ("a.csv", "text,kind\na,b\n", "no column label.*--label-column"),
            ("a.csv", "label,text\n,b\n", "expected texts with labels"),
            ("a.csv", 'label,text\na,"b, c"\nb,c, d\n', "1 of 2 rows.*line 3 has 3.*into quotes"),
            ("a.jsonl", "{", "not JSON"),
            ("a.jsonl", "[1]", "JSON object in each line"),
        ],
    )
    def test_what_cannot_be_read(self, tmp_path, name, content, message):
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=message):
            texts.read(tmp_path / name)

    def test_labels_without_spaces_around_them_and_nulls_that_are_none(self, tmp_path):
        path = tmp_path / "own.jsonl"
        rows = [{"label": " sun", "text": "x"}, {"label": "sun ", "text": "x"}, {"label": None, "text": "x"}]
        path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"label": 0, "text": "x"}]))
        assert [example.label for example in texts.read(path)] == ["sun", "sun", "0"]

    @pytest.mark.parametrize(("delimiter", "encoding"), [(";", "utf-8"), ("\t", "utf-16"), (",", "utf-8-sig")])
    def test_tables_as_spreadsheets_save_them(self, tmp_path, delimiter, encoding):
        path = tmp_path / "own.csv"
        rows = [["label", "text"], ["sun", f"dry{delimiter} warm é"], [], ["rain", "wet"]]
        with open(path, "w", newline="", encoding=encoding) as file:
            csv.writer(file, delimiter=delimiter).writerows(rows)
        assert texts.read(path) == [Example("sun", f"dry{delimiter} warm é"), Example("rain", "wet")]

    def test_what_is_not_utf_8_is_replaced_with_a_warning(self, tmp_path):
        path = tmp_path / "own.csv"
        path.write_bytes("label,text\nsun,warm\nsun,été\n".encode("latin-1"))
        with pytest.warns(jp.errors.JetplaneWarning, match="not in UTF-8 .line 3 is the first"):
            assert texts.read(path)[1].text == "\ufffdt\ufffd"

    def test_an_empty_folder(self, tmp_path):
        with pytest.raises(DataError, match="folder for each class"):
            texts.read(tmp_path)

    def test_parts_are_apart_and_all_runs_have_the_same(self):
        parts = texts.split(LABELLED, sizes=(100, 40, 52))
        every = parts.train + parts.dev + parts.test
        assert sorted(every, key=str) == sorted(LABELLED, key=str) and parts == texts.split(
            LABELLED, sizes=(100, 40, 52)
        )
        assert parts.classes == ["rain", "sun"] and parts.labels("dev").tolist() == [
            parts.classes.index(e.label) for e in parts.dev
        ]

    def test_fewer_texts_than_asked_for_shrink_all_parts(self):
        parts = texts.split(LABELLED)  # 192 of 2,500
        assert [len(p) for p in (parts.train, parts.dev, parts.test)] == [76, 38, 76]

    def test_own_test_texts(self):
        parts = texts.split(LABELLED[::2], LABELLED[1::2], (40, 20, 30))
        assert set(parts.test) <= set(LABELLED[1::2]) and len(parts.test) == 30

    @pytest.mark.parametrize(
        ("examples", "held", "message"),
        [
            (LABELLED[:20], None, "at least two classes"),
            (LABELLED[::10], None, "too few texts: train, dev and test would have"),
            ([Example(str(i), "x") for i in range(99)], None, "99 classes of 99 texts: is the label column"),
            (LABELLED, [Example("snow", "white")] * 9, "classes that the training texts lack: .*snow"),
        ],
    )
    def test_texts_that_do_not_do(self, examples, held, message):
        with pytest.raises(DataError, match=message):
            texts.split(examples, held)


class TestModel:
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_part_that_trains_continues_the_frozen_part_exactly(self, folder, kind):
        model = language_model.load(folder / kind)
        assert model.causal == (kind != "bert")
        words = [e.text for e in LABELLED[::20]] + ["the garden", "dry"]
        tokens = language_model.tokenize(model, words, None, 24)
        states = cached_states(model, tokens, 2, folder / "states")
        cut = TextClassifier(model, 2, 2, [4, 5] if model.causal else None, states.as_tuple)
        places = torch.tensor([8, 1, 10])
        with torch.no_grad():
            whole = model.base(input_ids=tokens.ids, attention_mask=tokens.mask).last_hidden_state[places]
            if model.causal:
                last = whole[torch.arange(3), tokens.mask[places].sum(1) - 1]
                expected = last @ model.readout[[4, 5]].T
            else:
                kept = tokens.mask[places].unsqueeze(2)
                cut.head.weight.normal_()
                expected = cut.head((whole * kept).sum(1) / kept.sum(1))
            torch.testing.assert_close(cut(*states.read(places)), expected, rtol=1e-4, atol=1e-5)
        assert sum(p.numel() for p in cut.base.parameters()) < sum(p.numel() for p in model.base.parameters())

    def test_states_are_computed_once(self, folder, tmp_path):
        model = language_model.load(folder / "llama")
        tokens, calls = language_model.tokenize(model, [e.text for e in LABELLED[:40]], None, 24), []
        for _ in range(2):
            cached_states(model, tokens, 1, tmp_path, lambda done, total: calls.append((done, total)))
        assert calls == [(32, 40), (40, 40)]
        with torch.no_grad():
            model.blocks[0].mlp.up_proj.weight.add_(1)  # another model
        cached_states(model, tokens, 1, tmp_path)
        cached_states(model, tokens, 2, tmp_path)
        assert len(list(tmp_path.glob("*.states"))) == 3

    def test_an_interrupted_run_is_continued(self, folder, tmp_path):
        model = language_model.load(folder / "bert")
        tokens = language_model.tokenize(model, [e.text for e in LABELLED], None, 24)
        whole = cached_states(model, tokens, 1, tmp_path / "whole")

        class Interrupted(Exception):
            pass

        def interrupt(done, total):
            if done >= 64:
                raise Interrupted

        with pytest.raises(Interrupted):
            cached_states(model, tokens, 1, tmp_path / "part", interrupt)
        (part,) = (tmp_path / "part").glob("*.part")
        part.write_bytes(part.read_bytes()[:-100])  # as where it was stopped in the middle of a part
        told = []
        again = cached_states(model, tokens, 1, tmp_path / "part", lambda done, total: told.append(done))
        assert told[0] == 64 and told[-1] == len(LABELLED)
        assert again.path.read_bytes() == whole.path.read_bytes() and not list((tmp_path / "part").glob("*.part"))

    def test_a_file_of_states_that_is_damaged_is_told(self, folder, tmp_path):
        model = language_model.load(folder / "llama")
        tokens = language_model.tokenize(model, [e.text for e in LABELLED[:4]], None, 24)
        states = cached_states(model, tokens, 1, tmp_path)
        states.path.write_bytes(states.path.read_bytes()[:-8])
        states.read(torch.tensor([0, 2]))
        with pytest.raises(DataError, match="too short for text 3 of 4; delete it"):
            states.read(torch.tensor([0, 3]))

    def test_a_long_text_keeps_the_prompt(self, folder):
        model = language_model.load(folder / "llama")
        tokens = language_model.tokenize(model, ["dry " * 100, "wet"], None, 12)
        assert tokens.ids.shape == (2, 12) and tokens.mask.sum(1).tolist() == [12, 3]
        assert model.tokenizer.convert_ids_to_tokens(tokens.ids[0, -2:].tolist()) == ["Topic", ":"]

    def test_prompts_and_words_that_do_not_do(self, folder):
        model = language_model.load(folder / "llama")
        with pytest.raises(ArgumentError, match="{text} in the prompt"):
            language_model.tokenize(model, ["dry"], "Topic:", 24)
        with pytest.raises(ArgumentError, match="raise --tokens"):
            language_model.tokenize(model, ["dry"], None, 9)
        with pytest.raises(ArgumentError, match="same token.*--word hail=WORD"):
            language_model.class_tokens(model, ["fog", "hail"])  # both unknown
        with pytest.raises(ArgumentError, match="do not exist.*snow"):
            language_model.class_tokens(model, ["sun", "rain"], {"snow": "storm"})
        assert language_model.class_tokens(model, ["fog", "rain"], {"fog": "storm"}) == [6, 5]

    def test_models_that_cannot_be_loaded(self, folder, tmp_path, monkeypatch):
        with pytest.raises(DataError, match="no such model"):
            language_model.load(tmp_path / "gone")
        with pytest.raises(DataError, match="cannot load it"):
            language_model.load(tmp_path)
        (tmp_path / "a.gguf").write_bytes(b"GGUF")
        monkeypatch.setattr(language_model.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(MissingPackageError, match="pip install gguf"):
            language_model.load(tmp_path / "a.gguf")
        monkeypatch.setitem(__import__("sys").modules, "transformers", None)
        with pytest.raises(MissingPackageError, match="cli,finetune"):
            language_model.load(folder / "llama")

    def test_weights_that_are_damaged(self, folder, tmp_path):
        shutil.copytree(folder / "bert", tmp_path / "bert")
        weights = tmp_path / "bert" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        with pytest.raises(DataError, match="cannot load it"):
            language_model.load(tmp_path / "bert")

    def test_as_many_blocks_as_there_are(self, folder):
        with pytest.raises(ArgumentError, match="from 1 to 2 of the 3 blocks"):
            prepared(folder, blocks=3)


class TestParameters:
    @pytest.mark.parametrize(
        ("kind", "name", "count"),
        [
            ("llama", "lora", 8 * (32 + 32) + 8 * (32 + 16)),  # q to 32 and v to 16 features
            ("llama", "prefix", 5 * 32),
            ("llama", "last-blocks", 2 * 32 + 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 32),
            ("llama", "norms", 3 * 32),
            ("llama", "head", 2 * 32),
            ("bert", "norms", 2 * 2 * 32 + 2 * 32 + 2),  # and the read-out, which is new
            ("bert", "head", 2 * 32 + 2),
        ],
    )
    def test_what_trains(self, folder, kind, name, count):
        task = prepared(folder, kind).task
        model = task.prepared(Settings(name), 0)
        assert sum(p.numel() for p in model.trained) == count
        assert not any(p.requires_grad for p in task.model.parameters())

    @pytest.mark.parametrize("kind", ["llama", "bert"])
    def test_slopes_of_all_of_them_are_those_of_backprop(self, folder, kind):
        task = prepared(folder, kind).task
        batch = task.batch(torch.arange(6))
        batch = dataclasses.replace(batch, states=batch.states.double())
        for name in ("lora", "prefix", "last-blocks", "norms", "head"):
            model = task.prepared(Settings(name), 0).double()
            for p in model.trained:
                p.data.add_(0.1 * torch.randn_like(p))
            directions = jp.Directions(3, seed=1)
            plane = jp.evaluate(lambda m=model: methods.loss_of(m, batch), model.trained, directions, "none")
            grads = torch.autograd.grad(methods.loss_of(model, batch), model.trained)
            tangents = directions.tangents(model.trained)
            slope = sum((v * g).flatten(1).sum(1) for v, g in zip(tangents, grads, strict=True))
            rounding = 1e-5 if kind == "llama" else 1e-7  # its norms and rotations are in single precision
            torch.testing.assert_close(plane.slope, slope, rtol=rounding, atol=rounding / 10)

    def test_adapters_start_at_the_model(self, folder):
        task = prepared(folder).task
        batch = task.batch(torch.arange(4))
        adapted = task.prepared(Settings("lora"), 0)
        assert torch.equal(adapted(batch.states, batch.mask), task.model(batch.states, batch.mask))

    def test_names_of_layers(self, folder):
        task = prepared(folder).task
        model = task.prepared(Settings("lora", targets=("up_proj",), rank=2), 0)
        assert sum(p.numel() for p in model.trained) == 2 * (32 + 48)
        with pytest.raises(ArgumentError, match="is named c_attn; the linear layers are .*q_proj.*--target"):
            parameters.choose(model, "lora", 0, targets=("c_attn",))
        with pytest.raises(ArgumentError, match="at least 1"):
            parameters.choose(model, "lora", 0, rank=0)


class TestResidualStream:
    """``dL/du_i = dL/dh`` along the stream, and exact derivatives within a sublayer."""

    @staticmethod
    def estimate(model, batch):
        params, estimator = model.trained, jp.gradients.ResidualStream(exact="sublayer")
        given = jp.gradients.Batch(
            lambda: methods.loss_of(model, batch), params, model, None, None, [], frozenset(range(len(params))), 0
        )
        *gradient, loss = estimator.measure(given, estimator.prepare(given, {}))
        torch.testing.assert_close(loss, methods.loss_of(model, batch).detach())
        return gradient

    @staticmethod
    def moved(folder, kind, name):
        task = prepared(folder, kind, blocks=2).task
        model = task.prepared(Settings(name), 0).double()
        for p in model.trained:
            p.data.add_(0.1 * torch.randn_like(p))
        batch = task.batch(torch.arange(6))
        return model, dataclasses.replace(batch, states=batch.states.double())

    @pytest.mark.parametrize("kind", ["llama", "gpt2"])
    def test_it_leaves_out_what_later_sublayers_make_of_the_stream(self, folder, kind):
        """Reverse mode through the model where sublayers with later numbers put out constants says the same."""
        model, batch = self.moved(folder, kind, "last-blocks")
        found = dict(zip(map(id, model.trained), self.estimate(model, batch), strict=True))
        names = ("self_attn", "mlp") if kind == "llama" else ("attn", "mlp")
        sublayers = [getattr(block, name) for block in model.blocks for name in names]
        kept = []
        hooks = [f.register_forward_hook(lambda module, args, out: kept.append(out)) for f in sublayers]
        methods.loss_of(model, batch)
        for hook in hooks:
            hook.remove()

        def detached(out):
            return tuple(None if y is None else y.detach() for y in out) if isinstance(out, tuple) else out.detach()

        for n, sublayer in enumerate(sublayers):
            hooks = [
                f.register_forward_hook(lambda module, args, out, y=y: detached(y))
                for f, y in zip(sublayers[n + 1 :], kept[n + 1 :], strict=True)
            ]
            own = list(sublayer.parameters())
            exact = torch.autograd.grad(methods.loss_of(model, batch), own)
            for p, g in zip(own, exact, strict=True):
                torch.testing.assert_close(found[id(p)], g, rtol=1e-5, atol=1e-7)
            for hook in hooks:
                hook.remove()

    @pytest.mark.parametrize(
        ("kind", "name"),
        [("llama", "lora"), ("llama", "prefix"), ("llama", "norms"), ("gpt2", "prefix"), ("gpt2", "norms")],
    )
    def test_all_that_trains_has_an_estimate(self, folder, kind, name):
        model, batch = self.moved(folder, kind, name)
        found = self.estimate(model, batch)
        assert all(bool(g.any()) for g in found)
        if name == "norms":  # the last norm is after all sublayers
            exact = torch.autograd.grad(methods.loss_of(model, batch), model.trained[-1])[0]
            torch.testing.assert_close(found[-1], exact, rtol=1e-5, atol=1e-7)

    def test_what_the_error_does_not_reach_stays(self, folder):
        model, batch = self.moved(folder, "llama", "lora")
        first = model.blocks[0].forward
        model.blocks[0].forward = lambda x, *args, **kwargs: first(x.detach(), *args, **kwargs).detach()
        with pytest.warns(jp.JetplaneWarning, match="depends on 4 of 8 parameters.*they stay"):
            found = self.estimate(model, batch)
        assert [bool(g.any()) for g in found] == 4 * [False] + 4 * [True]

    def test_blocks_that_add_nothing_to_their_input_are_refused_with_another_method(self, folder):
        model, batch = self.moved(folder, "llama", "lora")
        for block in model.blocks:
            block.forward = lambda *args, inner=block.forward, **kwargs: 0.5 * inner(*args, **kwargs)
        with pytest.raises(ArgumentError, match="no block of TextClassifier.*--method perturbation"):
            methods.METHODS["plane-search"].build(model, 1.0, 0, 16)(batch)


class TestTraining:
    def test_all_methods_are_options(self):
        assert tuple(methods.METHODS) == METHODS

    @pytest.mark.parametrize("name", methods.METHODS)
    def test_each_method(self, folder, name):
        outcome = run(prepared(folder).task, name, Settings(seconds=0.02, scores=1), None, 0)
        assert outcome.status == "finished" and outcome.steps >= 1 and outcome.seconds >= 0.02
        assert 0 <= outcome.test <= 1 and outcome.curve[-1]["dev"] == outcome.dev
        assert sum(t.numel() for t in outcome.weights.values()) == 8 * (32 + 32) + 8 * (32 + 16)

    @pytest.mark.parametrize(
        ("kind", "parameters", "local"), [("bert", "lora", True), ("llama", "lora", False), ("llama", "head", True)]
    )
    def test_plane_search_has_local_heads_where_the_read_out_trains_and_else_its_error(
        self, folder, monkeypatch, kind, parameters, local
    ):
        made = []
        real = jp.optim.PlaneSearch
        monkeypatch.setattr(
            jp.optim, "PlaneSearch", lambda *args, **kwargs: made.append(real(*args, **kwargs)) or made[0]
        )
        task = prepared(folder, kind).task
        model = task.prepared(Settings(parameters), 0)
        step = methods.METHODS["plane-search"].build(model, 1.0, 0, 4)
        assert step(next(task.batches(16, 0))) > 0
        assert isinstance(made[0].gradient, jp.gradients.LocalHeads if local else jp.gradients.ResidualStream)

    def test_it_learns(self, folder):
        task = prepared(folder, "bert").task
        model = task.prepared(Settings("last-blocks"), 0)
        step = methods.METHODS["plane-search"].build(model, 1.0, 0, 16)
        for batch, _ in zip(task.batches(16, 0), range(48), strict=False):
            step(batch)
        assert accuracy(model, task, task.places("test")) > 0.75  # of two classes that are as frequent

    def test_checkpoints_and_micro_batches_leave_adams_steps_as_they_are(self, folder):
        task, settings = prepared(folder).task, Settings("last-blocks", batch=10)
        ends = []
        for name, micro in (("adam", 0), ("adam-checkpointed", 3)):
            model = task.prepared(settings, 0).double()
            step, batches = methods.METHODS[name].build(model, 1e-3, 0, micro), task.batches(10, 0)
            for batch, _ in zip(batches, range(3), strict=False):
                step(dataclasses.replace(batch, states=batch.states.double()))
            ends.append(torch.cat([p.detach().flatten() for p in model.trained]))
        torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-8)

    def test_micro_batches_leave_planes_as_they_are(self, folder):
        task = prepared(folder).task
        model = task.prepared(Settings("lora"), 0).double()
        for p in model.trained:
            p.data.add_(0.1 * torch.randn_like(p))
        batch = task.batch(torch.arange(10))
        batch = dataclasses.replace(batch, states=batch.states.double())
        planes = [
            jp.evaluate(lambda size=size: methods.loss_of(model, batch, size), model.trained, jp.Directions(3), "ggn")
            for size in (None, 4)
        ]
        for name in ("value", "slope", "curvature"):
            torch.testing.assert_close(*(getattr(plane, name) for plane in planes), rtol=1e-5, atol=1e-7)

    def test_sofos_step(self, folder):
        """``theta - lr V (V^T G V + damping |.|_max I)^-1 V^T g``, with G = J^T H J of the batch, by reverse mode."""
        task = prepared(folder).task
        model = task.prepared(Settings("head"), 0).double()
        batch = task.batch(torch.arange(12))
        batch = dataclasses.replace(batch, states=batch.states.double())
        (w,) = model.trained
        before = w.detach().clone()
        opt = methods._sofo([w], model, 0.1, 0)
        opt.step(lambda: methods.loss_of(model, batch))
        with torch.no_grad():
            moved = (w - before).flatten()
            w.copy_(before)
        logits = model(batch.states, batch.mask).detach()
        (g,) = torch.autograd.grad(methods.loss_of(model, batch), [w])

        def out(flat):
            return torch.func.functional_call(model, {"head.weight": flat.reshape(w.shape)}, (batch.states, batch.mask))

        jacobian = torch.func.jacrev(out)(before.flatten())  # (texts, classes, weights)
        p = logits.softmax(1)
        bend = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
        whole = torch.einsum("nci,ncd,ndj->ij", jacobian, bend, jacobian) / len(p)
        v = opt.plane  # slope and curvature of its K directions
        kappa = -torch.linalg.solve(
            v.curvature + methods.SOFO_DAMPING * torch.linalg.eigvalsh(v.curvature)[-1] * torch.eye(len(v.slope)),
            v.slope,
        )
        torch.testing.assert_close(g.flatten() @ moved, 0.1 * (v.slope @ kappa), rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(moved @ whole @ moved, 0.01 * (kappa @ v.curvature @ kappa), rtol=1e-5, atol=1e-9)

    def test_a_run_that_fails_is_told_and_keeps_weights(self, folder):
        outcome = run(prepared(folder).task, "mezo", Settings(seconds=5, scores=100), 1e30, 0)
        assert outcome.status == "failed" and "finite" in outcome.message
        assert all(torch.isfinite(t).all() for t in outcome.weights.values()) and 0 <= outcome.test <= 1

    def test_a_search_ranks_rates_and_counts_all_trials(self, folder):
        task = prepared(folder, "bert").task
        tuned = comparison.tune(task, "adam", Settings("head", seconds=0.2), 4, 0)
        low, high = methods.METHODS["adam"].search
        assert len(tuned.trials) == 5 and all(low <= trial["rate"] <= high for trial in tuned.trials)
        assert tuned.rate == max(tuned.trials[:4], key=lambda trial: trial["dev"])["rate"]

    def test_settings_that_cannot_be(self):
        with pytest.raises(ArgumentError, match="seconds must be positive"):
            Settings(seconds=0)


class TestCommand:
    def test_the_command(self, folder, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        options = ["--model", str(folder / "bert"), "--data", str(folder / "weather.csv"), "--out", "result"]
        options += [
            "--parameters",
            "last-blocks",
            "--seconds",
            "2",
            "--clock",
            "processor",
            "--method",
            "plane-search",
            "--method",
            "mezo",
        ]
        done = CliRunner().invoke(cli.app, ["finetune", *options, "--trials", "2"], catch_exceptions=False)
        assert done.exit_code == 0 and "PlaneSearch" in done.output and "MeZO, tuned" in done.output
        content = json.loads((tmp_path / "result" / command.RESULT).read_text())
        ours, mezo = content["entries"]
        assert 0 <= ours["runs"][0]["test"] <= 1 and ours["tuned"] is None and len(mezo["tuned"]["trials"]) == 3
        assert mezo["memory"]["weights"] < mezo["memory"]["training"] < 2 * mezo["memory"]["inference"]
        assert content["sizes"] == [76, 38, 76] and content["environment"]["torch"] == torch.__version__
        saved = torch.load(io_of(tmp_path / "result" / "plane-search-0.pt"), weights_only=True)
        assert saved["classes"] == ["rain", "sun"] and "head.weight" in saved["weights"]
        with pytest.raises(RunFolderError, match="other options.*--out"):
            CliRunner().invoke(cli.app, ["finetune", *options], catch_exceptions=False)

    def test_the_same_comparison_goes_on_where_it_was_stopped(self, folder, tmp_path, monkeypatch):
        source = Source(folder / "bert", folder / "weather.csv", cache=folder / "states")
        settings, ran = Settings("head", seconds=0.1, scores=1, clock="processor"), []
        real = comparison.call_apart

        def stopped(work, task, name, *args, **kwargs):
            ran.append(name)
            if name == "fgd" and ran.count("fgd") == 1:
                raise KeyboardInterrupt
            return real(work, task, name, *args, **kwargs)

        monkeypatch.setattr(comparison, "call_apart", stopped)
        options = ["--model", str(folder / "bert"), "--data", str(folder / "weather.csv"), "--out", str(tmp_path / "a")]
        options += [
            "--parameters",
            "head",
            "--seconds",
            "0.1",
            "--clock",
            "processor",
            "--cache",
            str(folder / "states"),
        ]
        options += ["--method", "mezo", "--method", "fgd"]
        done = CliRunner().invoke(cli.app, ["finetune", *options])
        assert done.exit_code == 130 and "stopped; with --out" in done.output
        done = CliRunner().invoke(cli.app, ["finetune", *options], catch_exceptions=False)
        assert done.exit_code == 0 and "MeZO" in done.output and "FGD" in done.output
        assert ran == ["mezo", "fgd", "fgd"]
        work = command.Comparison(source, dataclasses.replace(settings, scores=Settings.scores), ["fgd", "mezo"])
        assert [entry["method"] for entry in command.compare(work, tmp_path / "a")["entries"]] == ["mezo", "fgd"]
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "notes").touch()
        with pytest.raises(RunFolderError, match="holds no comparison"):
            command.compare(work, tmp_path / "b")

    @pytest.mark.parametrize(
        ("option", "value", "message"),
        [
            ("--method", "sgd", "unknown method 'sgd'"),
            ("--rate", "mezo", "NAME=VALUE after --rate"),
            ("--rate", "mezo=fast", "a number"),
            ("--rate", "mezo=-1", "positive"),
            ("--rate", "sgd=1", "unknown method 'sgd'"),
            ("--rate", "fgd=1", "not among the methods: plane-search, mezo"),
            ("--rate", "plane-search=1", "takes none"),
            ("--word", "=x", "NAME=VALUE after --word"),
        ],
    )
    def test_options_that_do_not_do(self, folder, option, value, message):
        options = ["--model", str(folder / "bert"), "--data", str(folder / "weather.csv"), option, value]
        with pytest.raises(ArgumentError, match=message):
            CliRunner().invoke(cli.app, ["finetune", *options], catch_exceptions=False)


def test_a_table_keeps_its_words_in_a_narrow_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    row = {"method": "Adam, checkpointed", "test": "70.9 ± 1.5", "seconds": "8.1", "of inference": "0.78"}
    cli._print([row], left=("method",))
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("checkpointed", "70.9 ± 1.5", "of inference"))


def test_the_example(folder):
    spec = importlib.util.spec_from_file_location("finetune", Path(__file__).parent.parent / "examples/finetune.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    options = ["--model", str(folder / "llama"), "--data", str(folder / "weather.csv"), "--steps", "2"]
    assert 0 <= module.main([*options, "--cache", str(folder / "states")]) <= 1


def io_of(path):
    """The content of a checkpoint behind its line with the checksum."""
    return io.BytesIO(path.read_bytes().partition(b"\n")[2])
