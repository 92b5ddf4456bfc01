"""The specification, executable, in the order of the files. `test_Dnn_*` is the test of detail Dnn.

No network but the loopback interface, no GPU; all text is made here.
"""

import ast
import gzip
import hashlib
import http.server
import io
import itertools
import json
import lzma
import math
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn

import data
import finetune
import glue
import model
import train
from data import Cache, DataConfig, TrainingRows, WordPiece, segment
from model import Electra, ElectraConfig

HERE = Path(__file__).parent
CLS, SEP, MASK = 101, 102, 103

# Odd on purpose: embeddings wider than the generator and narrower than the discriminator, heads of 24.
SHAPE = dict(
    vocab_size=200,
    embedding_size=40,
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=96,
    max_position_embeddings=64,
    generator_size=0.5,
)
CONFIG = ElectraConfig(**SHAPE)
NO_DROPOUT = replace(CONFIG, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def make_electra(config=NO_DROPOUT, seed=0):
    torch.manual_seed(seed)
    return Electra(config)


def make_rows(count=6, length=32, seed=0, vocab_size=200):
    """Rows as data.py writes them: some full, some padded, with one segment or two."""
    random_ = np.random.default_rng(seed)
    rows = np.zeros((count, length), dtype=np.int64)
    for number, row in enumerate(rows):
        end = length if number % 2 else int(random_.integers(5, length))
        row[:end] = random_.integers(104, vocab_size, end)
        row[0], row[end - 1] = CLS, SEP
        if number % 3:
            row[end // 2] = SEP
    return torch.from_numpy(rows)


def make_noise(input_ids, config=CONFIG, seed=0):
    random_ = np.random.default_rng(seed)
    B, L = input_ids.shape
    uniform = random_.random((B, L)), random_.random((B, config.num_slots(L)), dtype=np.float32)
    return [torch.from_numpy(array) for array in uniform]


def run_electra(electra, input_ids, seed=0):
    return electra(input_ids, *make_noise(input_ids, electra.config, seed), electra.counts(input_ids))


def script(*numbers):
    """A `uniform` that returns these numbers in turn, and fails if it is asked for more."""
    return iter(numbers).__next__


# ------------------------------------------------------------------------------------------------------------
# model.py: the objective


@pytest.mark.parametrize(
    "size, count", [("small", 14_196_219), ("base", 119_386_427), ("large", 354_655_291)]
)
def test_parameter_counts(size, count):
    with torch.device("meta"):
        electra = Electra(ElectraConfig(**model.SIZES[size]))
    assert sum(parameter.numel() for parameter in electra.parameters()) == count


def test_the_default_config_is_small():
    assert ElectraConfig(**model.SIZES["small"]) == ElectraConfig()


def test_D06_a_selected_token_becomes_mask_with_probability_85_percent():
    ids = make_rows(400, 64, seed=1)
    config = replace(CONFIG, mask_prob=0.5)
    positions, weights, masked_ids = model.mask(ids, make_noise(ids, config)[0], config)
    at_slots = masked_ids.gather(1, positions)[weights > 0]
    original = ids.gather(1, positions)[weights > 0]
    assert ((at_slots == MASK) | (at_slots == original)).all()  # none becomes a random token
    share = (at_slots == MASK).double().mean().item()
    assert abs(share - 0.85) < 4 * math.sqrt(0.85 * 0.15 / len(at_slots))
    untouched = torch.ones_like(ids).scatter(1, positions, 0).bool()
    assert torch.equal(masked_ids[untouched], ids[untouched])


def test_D06_the_coin_is_independent_of_the_rank():
    ids = torch.full((2000, 64), 150)
    ids[:, 0], ids[:, -1] = CLS, SEP
    positions, weights, masked_ids = model.mask(ids, make_noise(ids)[0], CONFIG)
    visible = (masked_ids.gather(1, positions) == 150).double()  # (B, K), the slots in the order of rank
    per_slot = visible.mean(0)
    assert (abs(per_slot - 0.15) < 5 * math.sqrt(0.85 * 0.15 / len(ids))).all()


def test_D07_special_tokens_are_never_selected_and_unknown_ones_may_be():
    UNK = 100
    ids = torch.tensor([[CLS, UNK, MASK, SEP, UNK, SEP, 0, 0]])
    candidates = model.selectable(ids, CONFIG)
    assert candidates.tolist() == [[False, True, False, False, True, False, False, False]]
    config = replace(CONFIG, mask_prob=0.9)
    for seed in range(50):
        positions, weights, _ = model.mask(ids, make_noise(ids, config, seed)[0], config)
        assert sorted(positions[weights > 0].tolist()) == [1, 4]


@pytest.mark.parametrize("length, count", [(4, 1), (10, 2), (30, 4), (50, 8), (64, 10), (118, 18), (128, 19)])
def test_D08_count_rounds_half_to_even_in_fp32_from_1_to_K(length, count):
    # 0.15 x 10 = 1.5 -> 2; x 30 = 4.5 -> 4; x 50 = 7.5 -> 8; x 64 = 9.6 -> 10
    ids = torch.zeros(1, 128, dtype=torch.long)
    ids[0, :length] = 150
    ids[0, 0], ids[0, length - 1] = CLS, SEP
    assert model.num_predictions(ids, model.selectable(ids, CONFIG), CONFIG).item() == count
    positions, weights, masked_ids = model.mask(ids, make_noise(ids)[0], CONFIG)
    assert weights.shape == (1, 19) and weights.sum() == count
    assert (positions[weights == 0] == 0).all() and masked_ids[0, 0] == CLS


@pytest.mark.parametrize("mask_prob, length, slots", [(0.15, 128, 19), (0.15, 512, 79), (0.25, 512, 130)])
def test_D08_number_of_slots(mask_prob, length, slots):
    assert replace(CONFIG, mask_prob=mask_prob).num_slots(length) == slots


def test_D09_positions_are_drawn_uniformly_without_replacement():
    ids = torch.full((4000, 32), 150)
    ids[:, 0], ids[:, 20], ids[:, -1] = CLS, SEP, SEP
    positions, weights, _ = model.mask(ids, make_noise(ids)[0], CONFIG)
    assert weights.sum() == 4000 * 4  # 0.15 x 32 = 4.8 -> 5, but K = 4
    for row in positions[:200].tolist():
        assert len(set(row)) == len(row)
    counts = np.bincount(positions.flatten().numpy(), minlength=32)
    assert counts[[0, 20, 31]].sum() == 0
    assert stats.chisquare(np.delete(counts, [0, 20, 31])).pvalue > 1e-3


def test_D10_masks_are_drawn_anew_at_every_step_and_are_the_same_for_the_same_step():
    run = make_run_without_folder()
    ids = make_rows().numpy()

    def positions(step):
        run.step = step
        noise = torch.from_numpy(run.draw("train", ids)[0])
        return model.mask(torch.from_numpy(ids), noise, CONFIG)[0]

    assert torch.equal(positions(3), positions(3))
    assert not torch.equal(positions(3), positions(4))


def test_D11_samples_follow_the_softmax():
    logits = torch.tensor([2.0, -1.0, 0.5, -40.0, 1.0, 0.0])
    draws = 20_000
    uniform = torch.from_numpy(np.random.default_rng(0).random((draws, 1), dtype=np.float32))
    sampled = model.sample(logits.expand(draws, 1, 6), uniform)
    counts = np.bincount(sampled.flatten().numpy(), minlength=6)
    expected = logits.double().softmax(-1).numpy()
    assert counts[3] == 0
    keep = [0, 1, 2, 4, 5]
    assert stats.chisquare(counts[keep], expected[keep] / expected[keep].sum() * draws).pvalue > 1e-3


def test_D11_samples_at_the_ends_of_the_unit_interval_stay_in_the_vocabulary():
    logits = torch.tensor([[[-math.inf, 0.0, 0.0, -math.inf]]])
    just_below_one = np.nextafter(np.float32(1), np.float32(0))
    assert model.sample(logits, torch.tensor([[0.0]])).item() == 1
    assert model.sample(logits, torch.tensor([[just_below_one]])).item() == 2


def test_D11_no_gradient_flows_through_the_sample_and_one_generator_pass_serves_both():
    electra = make_electra()
    calls = []
    electra.generator.register_forward_hook(lambda *_: calls.append(1))
    output = run_electra(electra, make_rows())
    assert len(calls) == 1 and not output.corrupted_ids.requires_grad
    # The discriminator's loss alone gives the generator's own weights no gradient.
    electra.config = replace(electra.config, discriminator_weight=1e6)
    run_electra(electra, make_rows()).loss.backward()
    large = electra.generator.encoder.layers[0].output.weight.grad.norm()
    electra.zero_grad()
    electra.config = replace(electra.config, discriminator_weight=0.0)
    run_electra(electra, make_rows()).loss.backward()
    assert torch.allclose(large, electra.generator.encoder.layers[0].output.weight.grad.norm(), rtol=1e-3)


def test_D12_corruption_starts_from_the_unmasked_text_and_resamples_every_selected_token():
    ids = make_rows()
    positions, weights, masked_ids = model.mask(ids, make_noise(ids)[0], CONFIG)
    corrupted = model.corrupt(ids, positions, weights, torch.full_like(positions, 7))
    selected = torch.zeros_like(ids).bool()
    for row, places, used in zip(selected, positions, weights, strict=True):
        row[places[used > 0]] = True
    assert torch.equal(corrupted, torch.where(selected, 7, ids))
    kept_visible = selected & (masked_ids == ids)
    assert kept_visible.any() and (corrupted[kept_visible] == 7).all()
    assert not (corrupted == MASK).any()


def test_D13_a_sample_that_equals_the_original_counts_as_original():
    electra = make_electra()
    ids = make_rows()
    certain = torch.full((200,), -1e4)
    certain[150] = 1e4  # a generator that always says 150
    electra.generator.generator_lm_head["bias"].data = certain
    ids[:, 1:4] = 150
    output = run_electra(electra, ids)
    labels = ids.gather(1, output.positions)
    used = output.weights > 0
    assert (labels[used] == 150).any()
    assert torch.equal(output.is_replaced.gather(1, output.positions)[used], (labels != 150)[used])
    assert output.sampled_correct == (labels == 150)[used].sum()


def test_D14_the_discriminator_loss_covers_every_token_and_no_padding():
    electra = make_electra().eval()
    ids = make_rows()
    output = run_electra(electra, ids)
    losses = F.softplus(torch.where(output.is_replaced, -output.disc_logits, output.disc_logits))
    tokens = ids != 0  # [CLS] and [SEP] are in
    assert torch.allclose(output.disc_loss, losses[tokens].sum() / (tokens.sum() + 1e-6), rtol=1e-5)


def test_D15_the_loss_is_mlm_plus_50_discriminator_and_both_reach_the_embeddings():
    electra = make_electra().eval()
    ids = make_rows()
    output = run_electra(electra, ids)
    mask, types = model.attention_mask_and_token_types(ids, SEP)
    positions, weights, masked_ids = model.mask(ids, make_noise(ids)[0], CONFIG)
    log_probs = electra.generator(masked_ids, mask, types, positions).log_softmax(-1)
    by_hand = -log_probs.gather(2, ids.gather(1, positions)[..., None]).squeeze(-1)
    mlm_loss = (by_hand * weights).sum() / (weights.sum() + 1e-6)
    assert torch.allclose(output.mlm_loss, mlm_loss, rtol=1e-5)
    assert torch.allclose(output.loss, mlm_loss + 50 * output.disc_loss, rtol=1e-5)

    table = electra.generator.encoder.embeddings.word_embeddings.weight
    both = torch.autograd.grad(output.loss, table)[0]
    electra.config = replace(electra.config, discriminator_weight=0.0)
    mlm = torch.autograd.grad(run_electra(electra, ids).loss, table)[0]
    assert mlm.norm() > 0 and (both - mlm).norm() > 0


def test_D16_embeddings_and_their_layer_norm_are_one_object():
    electra = make_electra()
    assert electra.generator.encoder.embeddings is electra.discriminator.encoder.embeddings
    shared = {name for name, _ in electra.generator.encoder.embeddings.named_parameters()}
    assert shared == {
        "word_embeddings.weight",
        "position_embeddings.weight",
        "token_type_embeddings.weight",
        "LayerNorm.weight",
        "LayerNorm.bias",
    }


def test_D17_each_network_projects_embeddings_of_another_width():
    electra = make_electra()
    generator, discriminator = electra.generator.encoder, electra.discriminator.encoder
    assert generator.embeddings_project.weight.shape == (24, 40)
    assert discriminator.embeddings_project.weight.shape == (48, 40)
    same = make_electra(replace(NO_DROPOUT, embedding_size=48))
    assert same.discriminator.encoder.embeddings_project is None
    assert same.generator.encoder.embeddings_project is not None
    # It comes after the LayerNorm.
    ids, types = make_rows(), torch.zeros(6, 32, dtype=torch.long)
    seen = []
    discriminator.embeddings_project.register_forward_hook(lambda module, args, result: seen.append(args[0]))
    discriminator(ids, ids != 0, types)
    assert torch.equal(seen[0], discriminator.embeddings(ids, types))


@pytest.mark.parametrize(
    "size, shape", [("small", (64, 256, 1, 12)), ("base", (256, 1024, 4, 12)), ("large", (256, 1024, 4, 24))]
)
def test_D18_generator_is_narrower_not_shallower(size, shape):
    generator = ElectraConfig(**model.SIZES[size]).generator()
    assert shape == (
        generator.hidden_size,
        generator.intermediate_size,
        generator.num_attention_heads,
        generator.num_hidden_layers,
    )


def test_D19_mlm_head_at_the_selected_positions_only():
    generator = make_electra(CONFIG).generator.eval()
    ids, types = make_rows(), torch.zeros(6, 32, dtype=torch.long)
    positions = torch.tensor([[3, 1], [2, 2], [0, 4], [1, 1], [5, 6], [7, 8]])
    logits = generator(ids, ids != 0, types, positions)
    assert logits.shape == (6, 2, 200)
    hidden = generator.encoder(ids, ids != 0, types)
    dense, norm = generator.generator_predictions["dense"], generator.generator_predictions["LayerNorm"]
    table, bias = generator.encoder.embeddings.word_embeddings.weight, generator.generator_lm_head["bias"]
    everywhere = norm(F.gelu(dense(hidden))) @ table.T + bias
    for row in range(6):
        assert torch.allclose(logits[row], everywhere[row, positions[row]], atol=1e-6)
    assert not any(isinstance(module, nn.Dropout) for module in generator.generator_predictions.values())


def test_D20_discriminator_head():
    discriminator = make_electra(CONFIG).discriminator.eval()
    ids, types = make_rows(), torch.zeros(6, 32, dtype=torch.long)
    dense, last = discriminator.discriminator_predictions.values()
    hidden = F.gelu(dense(discriminator.encoder(ids, ids != 0, types)))
    assert torch.allclose(discriminator(ids, ids != 0, types), last(hidden)[..., 0], atol=1e-6)
    assert dense.weight.shape == (48, 48) and last.weight.shape == (1, 48)


def test_D21_initial_weights():
    electra = make_electra(replace(CONFIG, vocab_size=5000, hidden_size=192, num_attention_heads=3))
    glorot = {
        "discriminator.discriminator_predictions.dense_prediction.weight",
        "discriminator.encoder.embeddings_project.weight",
        "generator.encoder.embeddings_project.weight",
    }
    for name, weight in electra.named_parameters():
        if name.endswith("bias"):
            assert (weight == 0).all()
        elif "norm" in name.lower():
            assert (weight == 1).all()
        elif name in glorot:
            bound = math.sqrt(6 / sum(weight.shape))
            assert 0.9 * bound < weight.abs().max() <= bound
            glorot.remove(name)
        else:
            assert weight.abs().max() <= 0.04
            if weight.numel() > 5000:
                assert abs(weight.std() - 0.0176) < 0.0004 and weight.abs().max() > 0.039, name
    assert not glorot
    assert electra.generator.encoder.embeddings.word_embeddings.weight[0].abs().sum() > 0  # [PAD]


def test_D22_a_layer_is_post_norm_and_masks_keys_only():
    layer = make_electra().discriminator.encoder.layers[0]
    hidden, mask = torch.randn(2, 5, 48), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    q, k, v = layer.query_key_value(hidden).chunk(3, -1)
    attended = torch.zeros_like(hidden)
    for head in (slice(0, 24), slice(24, 48)):
        scores = q[..., head] @ k[..., head].transpose(1, 2) / math.sqrt(24)
        scores = scores - 1e4 * ~mask[:, None, :]
        attended[..., head] = scores.softmax(-1) @ v[..., head]
    middle = layer.attention_norm(hidden + layer.attention_output(attended))
    expected = layer.output_norm(middle + layer.output(F.gelu(layer.intermediate(middle))))
    assert torch.allclose(layer(hidden, mask[:, None, None, :]), expected, atol=1e-5)


def test_D22_dropout_follows_embeddings_attention_and_feed_forward_and_is_off_in_eval(monkeypatch):
    encoder, ids = make_electra(CONFIG).discriminator.encoder, make_rows()
    calls = []
    dropout, attention = F.dropout, F.scaled_dot_product_attention
    monkeypatch.setattr(
        F,
        "dropout",
        lambda x, p, training, inplace=False: (
            calls.append(("hidden", p if training else 0)),
            dropout(x, p, training, inplace),
        )[1],
    )
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda *args, dropout_p, **kwargs: (
            calls.append(("attention", dropout_p)),
            attention(*args, dropout_p=dropout_p, **kwargs),
        )[1],
    )
    encoder(ids, ids != 0, ids * 0)
    assert calls == [("hidden", 0.1)] + 2 * [("attention", 0.1), ("hidden", 0.1), ("hidden", 0.1)]
    calls.clear()
    encoder.eval()(ids, ids != 0, ids * 0)
    assert {p for _, p in calls} == {0}


def test_D23_the_pooled_vector_is_the_last_layers_as_it_is():
    encoder, ids = make_electra().discriminator.encoder, make_rows()
    seen = []
    encoder.layers[-1].register_forward_hook(lambda module, args, result: seen.append(result))
    assert encoder(ids, ids != 0, ids * 0) is seen[0]


def test_D35_attention_mask_and_token_types_follow_from_the_ids():
    ids = torch.tensor(
        [[CLS, 5, SEP, 6, 7, SEP, 0, 0], [CLS, 5, 6, SEP, 0, 0, 0, 0], [CLS, 5, SEP, 6, SEP, 7, SEP, 0]]
    )
    mask, types = model.attention_mask_and_token_types(ids, SEP)
    assert mask.int().tolist() == [
        [1, 1, 1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 0],
    ]
    assert types.tolist() == [[0, 0, 0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1, 0]]


@pytest.mark.parametrize("sampled", [0, SEP])
def test_D35_they_are_taken_from_the_original_ids_even_if_the_generator_samples_pad_or_sep(sampled):
    electra, ids = make_electra().eval(), make_rows()
    bias = torch.full((200,), -1e4)
    bias[sampled] = 1e4
    electra.generator.generator_lm_head["bias"].data = bias
    output = run_electra(electra, ids)
    mask, types = model.attention_mask_and_token_types(ids, SEP)
    assert (output.corrupted_ids[output.is_replaced] == sampled).all() and output.is_replaced.any()
    assert torch.allclose(output.disc_logits, electra.discriminator(output.corrupted_ids, mask, types))


def test_initial_losses():
    mlm, disc = [], []
    for seed in range(8):
        torch.manual_seed(seed)
        electra = Electra(ElectraConfig()).eval()
        ids = make_rows(4, 128, seed, 30_522)
        ids[:, 1:127] = torch.from_numpy(np.random.default_rng(seed).integers(1000, 30_000, (4, 126)))
        with torch.no_grad():
            output = run_electra(electra, ids)
        mlm.append(output.mlm_loss.item())
        disc.append(output.disc_loss.item())
    expected = math.log(30_522) + 128 * 0.0176**2 / 2  # 10.35
    for losses, value in (mlm, expected), (disc, math.log(2)):
        assert max(abs(loss - value) for loss in losses) < 0.15
        assert abs(np.mean(losses) - value) < 0.05


def test_the_objective_is_one_graph_for_the_compiler():
    electra, ids = make_electra(), make_rows()
    compiled = torch.compile(electra, fullgraph=True, backend="eager")
    noise, counts = make_noise(ids), electra.counts(ids)
    ours, theirs = electra(ids, *noise, counts), compiled(ids, *noise, counts)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "changes",
    [
        dict(embedding_size=48),
        dict(hidden_size=40, num_attention_heads=5),
        dict(hidden_size=200, num_attention_heads=4, generator_size=1.0),
    ],
)
def test_other_widths_and_heads_train(changes):
    electra, ids = make_electra(replace(CONFIG, **changes)), make_rows()
    run_electra(electra, ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in electra.parameters())


# ------------------------------------------------------------------------------------------------------------
# model.py: weights in and out

VOCAB = [
    "[PAD]",
    *(f"[unused{n}]" for n in range(99)),
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *(f"w{n}" for n in range(96)),
]


def huggingface():
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    return transformers


def save_network(name, folder, config=CONFIG, seed=0):
    network = getattr(make_electra(config, seed), name).eval()
    model.save_pretrained(
        network, getattr(config, name)(), folder, VOCAB, do_lower_case=False, strip_accents=False
    )
    return network


def logits_of(name, ours, theirs):
    """The logits of our network and of theirs on rows with padding and two segments."""
    ids = make_rows(8, 40, seed=3)
    mask, types = model.attention_mask_and_token_types(ids, SEP)
    with torch.no_grad():
        expected = theirs.eval()(input_ids=ids, attention_mask=mask.long(), token_type_ids=types).logits
        if name == "discriminator":
            return ours(ids, mask, types)[mask], expected[mask]
        positions = torch.arange(40).expand(8, 40)
        return ours(ids, mask, types, positions)[mask], expected[mask]


NETWORKS = {
    "discriminator": ("ElectraForPreTraining", model.Discriminator),
    "generator": ("ElectraForMaskedLM", model.Generator),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(
    "config", [CONFIG, replace(CONFIG, embedding_size=48)], ids=["projected", "not projected"]
)
def test_huggingface_loads_what_we_save(name, config, tmp_path):
    ours = save_network(name, tmp_path, config)
    loader = getattr(huggingface(), NETWORKS[name][0])
    theirs, report = loader.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["unexpected_keys"] and not report["missing_keys"] and not report["mismatched_keys"]
    one, other = logits_of(name, ours, theirs)
    assert (one - other).abs().max() < 1e-5


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_huggingface_saves_what_we_load(name, format, tmp_path):
    transformers = huggingface()
    shape = {
        field.name: getattr(getattr(CONFIG, name)(), field.name) for field in fields(model.TransformerConfig)
    }
    torch.manual_seed(5)
    theirs = getattr(transformers, NETWORKS[name][0])(transformers.ElectraConfig(**shape))
    for parameter in theirs.parameters():  # biases and [PAD] too
        nn.init.normal_(parameter, std=0.05)
    theirs.save_pretrained(tmp_path)
    if format == "bin":  # as Google's repositories hold it: tied duplicate and position_ids included
        (tmp_path / "model.safetensors").unlink()
        state = theirs.state_dict() | {"electra.embeddings.position_ids": torch.arange(64)[None]}
        torch.save(state, tmp_path / "pytorch_model.bin")
    config = model.load_config(tmp_path)
    assert config == getattr(CONFIG, name)()
    ours = NETWORKS[name][1](config).eval()
    model.load_weights(ours, tmp_path)
    one, other = logits_of(name, ours, theirs)
    assert (one - other).abs().max() < 1e-5


def test_huggingface_tokenizer_agrees_on_case_and_accents(tmp_path):
    save_network("discriminator", tmp_path)
    vocab = VOCAB[:104] + ["Élan", "elan", "e", "##lan", "É"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    theirs = huggingface().AutoTokenizer.from_pretrained(tmp_path)
    ours = WordPiece(vocab, do_lower_case=False, strip_accents=False)
    text = "Élan elan É"
    tokens = [ours.tokens[i] for i in ours.encode([text])[0]]
    assert tokens == theirs.tokenize(text) == ["Élan", "elan", "É"]


def test_what_is_saved_can_be_loaded_bit_by_bit(tmp_path):
    for name, (_, network) in NETWORKS.items():
        before = save_network(name, tmp_path / name)
        after = network(model.load_config(tmp_path / name))
        model.load_weights(after, tmp_path / name)
        for one, other in zip(before.state_dict().values(), after.state_dict().values(), strict=True):
            assert torch.equal(one, other)


def test_only_fine_tuning_may_leave_the_heads_unused(tmp_path):
    saved = save_network("discriminator", tmp_path)
    classifier = nn.Module()
    classifier.encoder, classifier.head = model.Encoder(CONFIG.discriminator()), nn.Linear(48, 2)
    head = classifier.head.weight.clone()
    model.load_weights(classifier, tmp_path, encoder_only=True)
    assert torch.equal(classifier.encoder.layers[1].output.weight, saved.encoder.layers[1].output.weight)
    assert torch.equal(classifier.head.weight, head)
    with pytest.raises(SystemExit, match="discriminator_predictions.dense.bias is left over"):
        model.load_weights(make_electra().generator, tmp_path)


def damage_weights(change):
    def damage(folder):
        tensors = model.read_safetensors(folder / "model.safetensors")
        change(tensors)
        model.write_safetensors(folder / "model.safetensors", tensors)

    return damage


def rewrite(name, change):
    def damage(folder):
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return damage


def header_with(**entry):
    header = json.dumps({"a": dict(dtype="F32", shape=[2], data_offsets=[0, 8]) | entry}).encode()
    return rewrite("model.safetensors", lambda _: len(header).to_bytes(8, "little") + header + bytes(8))


QUERY = "electra.encoder.layer.0.attention.self.query.weight"


@pytest.mark.parametrize(
    "damage, message",
    [
        (damage_weights(lambda t: t.pop(QUERY)), f"{QUERY} is missing"),
        (
            damage_weights(lambda t: t.update({QUERY: torch.zeros(3, 4)})),
            f"{QUERY} has shape .3, 4. instead of .48, 48.",
        ),
        (damage_weights(lambda t: t.update(extra=torch.zeros(1))), "extra is left over"),
        (
            damage_weights(lambda t: t.update({"generator_lm_head.weight": torch.zeros(200, 40)})),
            "is not tied",
        ),
        (rewrite("model.safetensors", lambda data: data[:-4]), "damaged"),
        (rewrite("model.safetensors", lambda data: data + b"1234"), "longer than its header says"),
        (rewrite("model.safetensors", lambda data: data[:5]), "damaged"),
        (rewrite("model.safetensors", lambda data: b"\xff" * 8 + data[8:]), "header is longer than the file"),
        (rewrite("model.safetensors", lambda data: data[:8] + b"x" + data[9:]), "damaged"),
        (header_with(data_offsets=[0, 1 << 40]), "disagree"),
        (header_with(data_offsets=[-8, 0]), "disagree"),
        (header_with(shape=[3]), "disagree"),
        (header_with(shape=[-1, -2]), "damaged"),
        (header_with(dtype="F8"), "damaged"),
        (
            lambda folder: (folder / "model.safetensors").unlink(),
            "neither model.safetensors nor pytorch_model.bin",
        ),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (rewrite("config.json", lambda data: b"{"), "is not a JSON object"),
        (rewrite("config.json", lambda data: b"[1]"), "is not a JSON object"),
        (
            rewrite("config.json", lambda data: data.replace(b": 48", b': "48"')),
            "hidden_size = '48', not a int",
        ),
        (rewrite("config.json", lambda data: data.replace(b'"electra"', b'"bert"')), "model_type = 'bert'"),
        (rewrite("config.json", lambda data: data.replace(b'"gelu"', b'"relu"')), "hidden_act = 'relu'"),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
            "is not a file of weights",
        ),
    ],
)
def test_a_damaged_model_folder_is_refused_in_one_sentence(damage, message, tmp_path):
    save_network("discriminator", tmp_path)
    damage(tmp_path)
    with pytest.raises(SystemExit, match=message) as stop:
        model.load_weights(model.Discriminator(model.load_config(tmp_path)), tmp_path)
    assert "\n" not in str(stop.value)


# ------------------------------------------------------------------------------------------------------------
# data.py: documents and tokens

WORDS = [
    f"{a}{b}"
    for a in ("ba", "do", "ku", "le", "mi")
    for b in ("", "ra", "sto", "vin", "zu", "gel", "pa", "non")
]
SMALL_VOCAB = [*data.SPECIAL_TOKENS, *WORDS, ".", ",", "##s"]


def make_text(documents=300, seed=0, words=WORDS):
    """Documents of lines of words in which each word mostly decides the next: something can be learnt."""
    random_ = random.Random(seed)
    texts = []
    for _ in range(documents):
        word, lines = random_.randrange(len(words)), []
        for _ in range(random_.randint(1, 8)):
            line = []
            for _ in range(random_.randint(3, 20)):
                frequent_ones_mostly = int(len(words) * random_.random() ** 3)
                word = (word * 7 + 3) % len(words) if random_.random() < 0.3 else frequent_ones_mostly
                line.append(words[word])
            lines.append(" ".join(line) + " .")
        texts.append("\n".join(lines))
    return texts


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A folder to work in, with corpus.txt of 300 documents and vocab.txt; units are small, and so many.

    Training prepares its text in this process, to be fast; `streaming` undoes that.
    """

    @contextmanager
    def producing(cache):
        cache.prepare()
        yield

    monkeypatch.setattr(Cache, "producing", producing)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "UNIT_CHARACTERS", 10_000)
    Path("corpus.txt").write_text("\n\n".join(make_text()), encoding="utf-8")
    Path("vocab.txt").write_text("\n".join(SMALL_VOCAB) + "\n", encoding="utf-8")
    return tmp_path


def data_config(*paths, **changes):
    return DataConfig(**dict(data=paths or ("corpus.txt",), vocab="vocab.txt", max_length=32) | changes)


def documents(*paths, **changes):
    return [text for *_, text in data.read_documents(data_config(*map(str, paths), **changes))]


def test_text_files_are_split_at_blank_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\ntwo\u2028still two\r\n \r\n\r\nthree\n".encode())
    assert documents(path) == ["one\ntwo\u2028still two", "three"]
    assert documents(path, one_document_per_file=True) == ["one\ntwo\u2028still two\n \n\nthree"]


def test_jsonl_gz_xz_and_folders(tmp_path):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in ("a\n\nb", "", "c"))
    (tmp_path / "3.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "x.txt.xz").write_bytes(lzma.compress(b"x"))
    (tmp_path / "2.jsonl").write_text(lines)
    (tmp_path / "README.md").write_text("not text for training")
    (tmp_path / ".hidden.txt").write_text("nor this")
    assert documents(tmp_path) == ["x", "a\n\nb", "c", "a\n\nb", "c"]
    assert documents(tmp_path / "3.jsonl.gz", tmp_path / "1" / "x.txt.xz") == ["a\n\nb", "c", "x"]


def test_python_docs_are_read_without_importing(tmp_path, monkeypatch):
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").write_text(
        '"""First."""\nraise SystemError\nclass A:\n    """Second."""\n    def f():\n        """Third."""\n'
    )
    (package / "newer.py").write_text(
        'def f[T]():\n    """Not for this Python, perhaps."""\n    match = = 1\n'
    )
    (package / "test").mkdir()
    (package / "test" / "a.py").write_text('"""A test."""')
    (tmp_path / "std" / "pydoc_data").mkdir(parents=True)
    (tmp_path / "std" / "pydoc_data" / "topics.py").write_text("topics = {'a': 'Topic a', 'b': 'Topic b'}\n")
    monkeypatch.setattr(data.sysconfig, "get_path", lambda name: str(tmp_path / "std"))
    spec = type("spec", (), {"origin": str(package / "__init__.py")})
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: spec)
    texts = data.python_docs(tmp_path / "cache")
    assert set(texts) == {"First.\nSecond.\nThird.", "Topic a", "Topic b"}
    (package / "__init__.py").unlink()
    assert data.python_docs(tmp_path / "cache") == texts  # kept


@pytest.mark.parametrize(
    "text, tokens",
    [
        ("Kura, bazu!", ["kura", ",", "bazu", "[UNK]"]),
        ("[SEP] [MASK]", ["[UNK]", "[UNK]", "[UNK]"] * 2),
        ("KÜRAs", ["kura", "##s"]),
        ("ba" * 100, ["[UNK]"]),
        ("", []),
    ],
)
def test_wordpiece(text, tokens):
    [ids] = WordPiece(SMALL_VOCAB).encode([text])
    assert [SMALL_VOCAB[i] for i in ids] == tokens


@pytest.mark.parametrize("do_lower_case", [True, False])
def test_wordpiece_spares_printable_ascii_the_normalizer_and_gives_the_same_ids(monkeypatch, do_lower_case):
    monkeypatch.setattr(data, "ENCODED_CHARACTERS", 500)
    random_ = random.Random(0)
    ascii_, others = [chr(code) for code in range(128)], "éÉ中İſ\u2028\ufffd\xa0\xad"
    lines = [
        "".join(random_.choices(ascii_[32:127] + (ascii_ + [*others] if number % 2 else []), k=60))
        for number in range(400)
    ]
    tokens = [*data.SPECIAL_TOKENS, *{c for line in lines for c in line if c.isprintable() and c != " "}]
    tokens += [f"##{token}" for token in tokens[5:]]
    wordpiece = WordPiece(tokens, do_lower_case)
    library = wordpiece.tokenizer.encode_batch(lines, add_special_tokens=False)
    assert wordpiece.encode(lines) == [encoding.ids for encoding in library]
    assert sum(map(str.isascii, lines)) > 200 and wordpiece.encode([]) == []


def test_wordpiece_takes_words_of_200_characters_cased_and_accented_ones():
    long, accented = "x" * 200, "Ünï"
    wordpiece = WordPiece(
        [*data.SPECIAL_TOKENS, long, accented, "uni"], do_lower_case=False, strip_accents=True
    )
    assert wordpiece.encode([f"{long} {accented} uni x{long}"]) == [[5, 6, 7, 1]]
    assert not wordpiece.strip_accents  # as in the official code, accents go with the case
    assert WordPiece(wordpiece.tokens).encode([accented]) == [[7]]
    assert WordPiece([*data.SPECIAL_TOKENS, "ünï"], strip_accents=False).encode(["Ünï"]) == [[5]]


def test_a_vocabulary_is_trained_once_for_a_text(corpus):
    config = data_config(vocab="train:60")
    first = data.load_wordpiece(config)
    [path] = Path("cache").glob("*vocab.txt")
    assert first.tokens[:5] == data.SPECIAL_TOKENS and 20 < len(first.tokens) <= 60
    path.write_text("\n".join(first.tokens[::1] + ["marker"]))
    assert data.load_wordpiece(config).tokens[-1] == "marker"  # reused, not trained again
    Path("corpus.txt").write_text("other text here")
    assert data.load_wordpiece(config).tokens[-1] != "marker"


def test_a_trained_vocabulary_has_no_more_tokens_than_asked_for(corpus):
    Path("many.txt").write_text(
        "".join(chr(0x4E00 + n) + "ab" * (n % 7) for n in range(900)), encoding="utf-8"
    )
    tokens = data.load_wordpiece(data_config("many.txt", vocab="train:60")).tokens
    assert len(tokens) <= 60 and any(len(token.removeprefix("##")) > 1 for token in tokens[5:])


def test_half_a_surrogate_pair_in_json_does_no_harm(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "ba \ud800 ra"}) + "\n")
    [text] = documents(tmp_path / "a.jsonl")
    assert text == "ba ? ra" and WordPiece(SMALL_VOCAB).encode([text])


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`, {path: bytes}, on the loopback interface; `fault()` says what goes wrong next."""

    daemon_threads = True

    def __init__(self, files, fault=lambda: None, ranges=True):
        self.requests = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.server.requests.append((self.path, self.headers.get("Range")))
                body, trouble = files.get(self.path.split("?")[0]), fault()
                if trouble in (429, 503) or body is None:
                    self.answer(trouble or 404, b"", {})
                elif trouble == "redirect" and "?" not in self.path:
                    self.answer(302, b"", {"Location": f"{self.path}?again"})
                else:
                    headers, status, whole = {"ETag": hashlib.md5(body).hexdigest()}, 200, body
                    if ranges and (asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))):
                        body, status = body[int(asked[1]) :], 206 if int(asked[1]) < len(whole) else 416
                        part = f"{asked[1]}-{len(whole) - 1}" if status == 206 else "*"
                        headers["Content-Range"] = f"bytes {part}/{len(whole)}"
                    self.answer(status, body, headers, trouble)

            def answer(self, status, body, headers, trouble=None):
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(body))} | headers).items():
                    if value is not None:
                        self.send_header(name, value)
                self.end_headers()
                with suppress(ConnectionError):
                    if trouble in ("cut", "reset", "stall"):
                        body = body[: len(body) // 3]
                    for start in range(0, len(body), len(body) // 4 + 1):
                        self.wfile.write(body[start : start + len(body) // 4 + 1])
                        time.sleep(0.02 if trouble == "slow" else 0)
                if trouble == "stall":
                    time.sleep(1)  # longer than the client's patience
                if trouble == "reset":  # RST instead of FIN
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    os.close(self.connection.detach())

            def log_message(self, *args):
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(data, "BACKOFF", 0.001)
    monkeypatch.setattr(data, "TIMEOUT", 0.5)


def test_the_vocabulary_is_downloaded_once_and_checked(corpus, monkeypatch, quick):
    body = "\n".join(SMALL_VOCAB).encode()
    known = data.BERT_VOCAB | dict(size=len(body), sha256=hashlib.sha256(body).hexdigest())
    monkeypatch.setattr(data, "BERT_VOCAB", known)
    path = known["address"].removeprefix("hub:")
    files, troubles = {path: body}, iter([])
    with Server(files, lambda: next(troubles, None)) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        files[path] = body[:-1] + b"x"
        with pytest.raises(SystemExit, match="SHA-256 .* instead of .*--vocab FILE"):
            data.load_wordpiece(data_config(vocab="bert"))
        del files[path]
        with pytest.raises(SystemExit, match="404.*--vocab train:8192"):
            data.load_wordpiece(data_config(vocab="bert"))
        assert [path.suffix for path in Path("cache").iterdir()] == [".lock"]  # nothing half-written
        files[path], troubles = body, iter(["cut", "reset", None])
        assert data.load_wordpiece(data_config(vocab="bert")).tokens == SMALL_VOCAB
    assert data.load_wordpiece(data_config(vocab="bert")).tokens == SMALL_VOCAB  # the server is gone


# ------------------------------------------------------------------------------------------------------------
# data.py: examples of two segments

LINES = [[10, 11], [12, 13], [14, 15], [16, 17, 18, 19, 20], [21]]


def test_D01_an_example_never_crosses_the_end_of_a_document():
    # In each document all ids are the same, so a row with two kinds would have crossed.
    wordpiece, config = WordPiece(SMALL_VOCAB), data_config()
    documents = [(False, [[number] * 7] * 9) for number in range(5, 45)]
    rows, _, kept, dropped = data.build_rows(documents, 0, wordpiece, config)
    assert len(rows) >= 80 and kept + dropped == 40 * 63
    for row in rows:
        assert len(set(row.tolist()) - {0, 2, 3}) == 1


@pytest.mark.parametrize(
    "uniforms, first, second, why",
    [
        # 0.5 first: no random target; then at each example 0.5: two segments; half is (12 - 3) // 2 = 4
        (
            [0.5, 0.5, 0.5, 0.5],
            [10, 11, 21],
            [12, 13, 14, 15, 16, 17],
            "2 + 2 is not strictly under 4, 2 + 1 is",
        ),
        ([0.5, 0.5, 0.4, 0.5], [10, 11, 12, 13], [14, 15, 16, 17, 18], "the toss puts the second line first"),
        ([0.5, 0.05, 0.5], [10, 11, 12, 13, 14, 15, 16, 17, 18, 19], [], "one in ten has no second segment"),
    ],
)
def test_D02_lines_are_dealt_to_two_segments(uniforms, first, second, why):
    examples = segment(LINES, 12, iter([*uniforms, 0.5, 0.5, 0.5, 0.5]).__next__)
    assert next(examples)[:2] == (first, second), why


def test_D02_line_order_can_break_even_after_the_second_segment_has_begun():
    lines = [[10], [11, 12, 13, 14, 15], [16], [17]]
    [(first, second, _)] = segment(
        lines, 13, script(0.5, 0.5, 0.5)
    )  # half is 5: the long line does not fit, toss lost
    assert (first, second) == ([10, 16, 17], [11, 12, 13, 14, 15])


def test_D02_the_end_of_a_document_and_single_lines():
    assert list(segment([[10, 11]], 12, script(0.5, 0.5))) == [([10, 11], [], 0)]
    assert list(segment([], 12, script(0.5))) == []


def test_D03_the_next_example_may_aim_at_a_random_length():
    # 0.04 < 0.05, then 5 + int(0.5 x 8) = 9 for a max_length of 12: three lines of 2 and one of 5 reach it
    lines = LINES + LINES
    lengths = [len(a) + len(b) for a, b, _ in segment(lines, 12, script(0.04, 0.5, *[0.5] * 20))]
    assert lengths[0] == 9  # cut at max_length - 3, not at the target
    assert [data.draw_target(128, script(0.04, u)) for u in (0.0, 0.9999999)] == [5, 128]
    assert data.draw_target(128, script(0.05)) == 128
    uniform = random.Random(0).random
    targets = [data.draw_target(128, uniform) for _ in range(40_000)]
    short = [target for target in targets if target < 128]
    assert abs(len(short) / 40_000 - 0.05 * 123 / 124) < 4 * math.sqrt(0.05 * 0.95 / 40_000)
    assert abs(np.mean(short) - 66) < 4 * 36 / math.sqrt(len(short))


def test_D03_each_document_begins_with_a_draw_of_its_own():
    # 0.01 and 0.0: the target is 5, so the first example is complete with the second line.
    examples = list(segment([[10, 11, 12], [13, 14], [15]], 12, script(0.01, 0.0, 0.05, 0.9, 0.5)))
    assert examples == [([10, 11, 12, 13, 14], [], 0), ([15], [], 0)]


def test_D04_the_overflow_is_dropped():
    long = list(range(100, 130))
    [(first, second, dropped)] = segment([long], 12, script(0.5, 0.5, 0.5))
    assert (first, second, dropped) == (long[:10], [], 20)  # [CLS] + 10 + [SEP]
    [(first, second, dropped)] = segment([[1, 2, 3], long], 12, script(0.5, 0.5, 0.5, 0.5))
    assert (first, second, dropped) == ([1, 2, 3], long[:6], 24)  # [CLS] + 3 + [SEP] + 6 + [SEP]
    [(first, second, dropped)] = segment([list(range(9)), long], 12, script(0.5, 0.5, 0.5, 0.5))
    assert (first, second, dropped) == (list(range(9)), [], 30)  # 9 leaves no room for a second


def test_rows_are_a_document_of_ids_with_special_tokens_and_zeros(corpus):
    Path("one.txt").write_text("ba bara\nbasto", encoding="utf-8")
    cache = prepared(data_config("one.txt", max_length=8))
    rows = np.concatenate([cache.load(kind, [0]) for kind in ("train", "heldout")])
    assert rows.dtype == np.uint16
    assert rows.tolist() in ([[2, 5, 6, 3, 7, 3, 0, 0]], [[2, 5, 6, 7, 3, 0, 0, 0]])


# ------------------------------------------------------------------------------------------------------------
# data.py: the cache and the order


def prepared(config):
    cache = Cache(config, data.load_wordpiece(config))
    cache.prepare()
    return cache


def contents(cache):
    return {path.name: path.read_bytes() for path in cache.folder.iterdir()}


def test_cache_manifest_counts_what_is_there(corpus):
    cache = prepared(data_config())
    shards, complete = cache.read_manifest()
    assert complete and len(shards) > 4
    assert sum(shard["documents"] for shard in shards) == 300
    for shard in shards:
        train, heldout = cache.load("train", [shard["shard"]]), cache.load("heldout", [shard["shard"]])
        assert (len(train), len(heldout)) == (shard["rows"], shard["heldout_rows"])
        special = sum((rows == i).sum() for rows in (train, heldout) for i in (2, 3))
        assert shard["tokens_kept"] == sum((rows != 0).sum() for rows in (train, heldout)) - special
    total = sum(shard["tokens_kept"] + shard["tokens_dropped"] for shard in shards)
    assert total == sum(len(text.split()) for text in make_text())


def test_cache_holds_out_documents_by_a_hash_of_their_text(corpus):
    pairs = list(itertools.permutations(WORDS, 2))[:600]
    texts = {f"{one} {other} " * 5: (one, other) for one, other in pairs}
    heldout = {
        pair
        for text, pair in texts.items()
        if int(hashlib.sha256(text.strip().encode()).hexdigest()[:16], 16) % 100 == 0
    }
    assert 0 < len(heldout) < 20
    Path("corpus.txt").write_text("\n\n".join(texts))
    cache = prepared(data_config())
    rows = cache.heldout(1000)
    assert {tuple(cache.wordpiece.decode(row).split()[1:3]) for row in rows} == heldout
    trained_on = {tuple(cache.wordpiece.decode(row).split()[1:3]) for row in cache.load("train", [0])}
    assert trained_on and not trained_on & heldout
    assert np.array_equal(cache.heldout(2), rows[:2])


@pytest.mark.parametrize("torn", [b"", b'{"shard": 9'])
def test_cache_is_the_same_bytes_after_any_stop(corpus, monkeypatch, torn):
    whole = contents(prepared(data_config()))
    config = data_config(cache="other")
    cache, append = Cache(config, data.load_wordpiece(config)), data.append
    for stop_at in (0, 1, 3, 2):  # after so many lines of the manifest the process is gone
        lines = itertools.count()

        def stop(file, entry, lines=lines, stop_at=stop_at):
            if next(lines) == stop_at:
                file.write(torn)
                file.flush()
                raise KeyboardInterrupt
            append(file, entry)

        monkeypatch.setattr(data, "append", stop)
        with pytest.raises(KeyboardInterrupt):
            cache.prepare()
    monkeypatch.setattr(data, "append", append)
    cache.prepare()
    assert contents(cache) == whole
    monkeypatch.setattr(data, "read_documents", lambda *_: pytest.fail("a complete cache needs no reading"))
    cache.prepare()


@pytest.mark.parametrize(
    "change",
    [
        dict(max_length=16),
        dict(seed=1),
        dict(do_lower_case=False),
        dict(vocab="v2.txt"),
        dict(one_document_per_file=True),
        dict(strip_accents=False),
        dict(data=("b.txt",)),
    ],
)
def test_cache_of_anything_else_is_not_reused(corpus, change):
    Path("v2.txt").write_text("\n".join([*SMALL_VOCAB, "more"]))
    Path("b.txt").write_bytes(Path("corpus.txt").read_bytes())
    before, after = data_config(), replace(data_config(), **change)
    folders = {Cache(config, data.load_wordpiece(config)).folder for config in (before, after)}
    assert len(folders) == 2
    os.utime("corpus.txt", (1, 1))
    assert Cache(before, data.load_wordpiece(before)).folder not in folders


def test_cache_rows_of_a_document_do_not_depend_on_its_neighbours():
    documents = [(False, [[number] * 7] * 9) for number in range(5, 25)]
    others = [(False, [[7] * 11] * 5) if index % 3 == 1 else one for index, one in enumerate(documents)]
    one, other = (
        data.build_rows(some, 4, WordPiece(SMALL_VOCAB), data_config())[0] for some in (documents, others)
    )
    for index in range(0, 20, 3):
        number = documents[index][1][0][0]
        assert np.array_equal(one[one[:, 1] == number], other[other[:, 1] == number])
    moved = data.build_rows(documents, 5, WordPiece(SMALL_VOCAB), data_config())[0]
    assert not np.array_equal(one, moved)  # but on the seed, the unit and its place in it they do


def test_order_is_by_groups_of_shards_and_each_epoch_is_a_permutation(corpus, monkeypatch):
    monkeypatch.setattr(data, "MAX_GROUP", 4)
    cache = prepared(data_config())
    rows = TrainingRows(cache)
    shards = len(cache.read_manifest()[0])
    groups = [next_groups for next_groups in itertools.takewhile(lambda group: group[0] < 3, rows.groups())]
    first_epoch = [members for epoch, _, members in groups if epoch == 0]
    assert shards > 7 and [len(members) for members in first_epoch[:3]] == [1, 2, 4]
    assert all(len(members) <= 4 for members in first_epoch[3:])
    assert list(itertools.chain(*first_epoch)) == list(range(shards))
    for epoch in (1, 2):
        members = list(itertools.chain(*(m for e, _, m in groups if e == epoch)))
        assert sorted(members) == list(range(shards)) != members
    everything = sorted(map(bytes, cache.load("train", range(shards))))
    flat = list(
        itertools.islice((row for _, batch in rows.batches(0, 7) for row in batch), 2 * len(everything))
    )
    for epoch in range(2):
        part = flat[epoch * len(everything) : (epoch + 1) * len(everything)]
        assert sorted(bytes(row.astype(np.uint16)) for row in part) == everything
    first = cache.load("train", [0])
    assert sorted(map(bytes, first)) == sorted(bytes(row.astype(np.uint16)) for row in flat[: len(first)])
    assert not np.array_equal(first, np.array(flat[: len(first)]))


def test_order_from_any_step_is_the_tail_of_the_order_from_the_first(corpus):
    rows = TrainingRows(prepared(data_config()))
    steps = 3 * sum(shard["rows"] for shard in rows.cache.read_manifest()[0]) // 64
    whole = list(itertools.islice(rows.batches(0, 64), steps))
    assert whole[-1][0] >= 2
    for start in (1, 5, steps // 2, steps - 1):
        tail = list(itertools.islice(rows.batches(start, 64), steps - start))
        for (epoch, batch), (other_epoch, other) in zip(whole[start:], tail, strict=True):
            assert epoch == other_epoch and np.array_equal(batch, other)
    halves = itertools.islice(rows.batches(0, 32), 4)  # row g does not depend on the batch size
    assert np.array_equal(
        np.concatenate([batch for _, batch in halves]), np.concatenate([b for _, b in whole[:2]])
    )


def test_prefetch_hands_on_items_and_errors():
    def items():
        yield 1
        sys.exit("a sentence")

    iterator = data.prefetch(items())
    assert next(iterator) == 1
    with pytest.raises(SystemExit, match="a sentence"):
        next(iterator)


def test_data_command_shows_rows_and_warns_of_long_lines(corpus, capsys):
    data.main(["--data", "corpus.txt", "--vocab", "vocab.txt", "--max-length", "32", "--show", "2"])
    printed = capsys.readouterr().out
    assert "300 documents gave" in printed and printed.count("[CLS]") == 2 and "warning" not in printed
    Path("long.txt").write_text("\n\n".join(text.replace("\n", " ") * 3 for text in make_text(20)))
    data.main(["--data", "long.txt", "--vocab", "vocab.txt", "--max-length", "32", "--workers", "1"])
    assert "warning: that is a lot" in capsys.readouterr().out
    assert os.environ["RAYON_NUM_THREADS"] == "1"


# ------------------------------------------------------------------------------------------------------------
# data.py: archives and the network


def make_tar(members, mode="w", comment=""):
    """Bytes of a tar of {name: bytes}; mode "w:xz" is one in xz; a comment makes an extended header."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.pax_headers = {"comment": comment} if comment else {}
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def make_openwebtext(documents=120, per_archive=20, seed=1):
    """A tar in the corpus's own nesting: an outer tar of xz-compressed tars of one .txt per document."""
    texts, members = (
        make_text(documents, seed),
        {"openwebtext/README": b"no text", "openwebtext/folder.txt/": b""},
    )
    for start in range(0, documents, per_archive):
        inner = {
            f"{start + n:07d}-{'0' * 32}.txt": text.encode()
            for n, text in enumerate(texts[start : start + per_archive])
        }
        members[f"openwebtext/urlsf_subset00-{start}_data.xz"] = make_tar({"notes": b"none", **inner}, "w:xz")
    return texts, make_tar(members)


@pytest.mark.parametrize("name, mode", [("a.tar", "w"), ("a.tar.gz", "w:gz"), ("a.tar.xz", "w:xz")])
def test_archives_are_read_in_their_nesting_and_never_unpacked(corpus, name, mode):
    inner = make_tar({"../x.txt": b"one\n\nstill one", "/etc/y.txt": b"\xef\xbb\xbftwo"}, "w:xz")
    lines = b'{"text": "three"}\n{"text": "four"}\n'
    Path(name).write_bytes(
        make_tar(
            {
                "skipped.bin": b"\xff",
                "b_data.xz": inner,
                "c.jsonl.gz": gzip.compress(lines),
                "d.txt.xz": lzma.compress(b"five"),
                "e.tar": make_tar({"f.txt": b"six"}),
                "../g.txt": b"seven",
            },
            mode,
        )
    )
    before = set(Path(".").rglob("*"))
    assert documents(name) == ["one\n\nstill one", "two", "three", "four", "five", "six", "seven"]
    assert set(Path(".").rglob("*")) == before


def test_an_inner_archive_is_a_unit_and_its_position_an_offset_in_the_outer_tar(corpus):
    texts, content = make_openwebtext()
    Path("owt.tar").write_bytes(content)
    cache = prepared(data_config("owt.tar"))
    shards, _ = cache.read_manifest()
    assert [shard["documents"] for shard in shards] == [20] * 6
    offsets = [shard["next"][1] for shard in shards[:-1]]
    with tarfile.open("owt.tar") as tar:
        assert offsets == [member.offset for member in tar if member.name.endswith(".xz")][1:]
    everything = [text for *_, text in data.read_documents(data_config("owt.tar"))]
    assert everything == texts
    for shard, start in zip(shards, range(20, 121, 20), strict=True):
        rest = [text for *_, text in data.read_documents(data_config("owt.tar"), shard["next"])]
        assert rest == texts[start:]


def test_units_are_the_same_from_wherever_reading_resumes(corpus):
    for name in ("a.tar", "b.tar"):  # the first member is an archive, as in the corpus
        members = {f"{n}_data.xz": make_tar({f"{n}.txt": f"{name} {n}".encode()}, "w:xz") for n in range(3)}
        Path(name).write_bytes(make_tar(members))
    config = data_config("a.tar", "b.tar")
    units = list(data.read_units(config, (0, 0, 0), {}))
    assert [texts for texts, *_ in units] == [[f"{name}.tar {n}"] for name in "ab" for n in range(3)]
    for number, (_, following, _) in enumerate(units, 1):
        assert list(data.read_units(config, following, {})) == units[number:]


def test_a_flipped_bit_in_a_compressed_tar_is_found_by_its_checksum(corpus):
    content = bytearray(
        make_tar({f"{n}.txt": text.encode() for n, text in enumerate(make_text(100))}, "w:gz")
    )
    for place in range(100, len(content) - 20, len(content) // 12):
        content[place] ^= 1
        Path("flipped.tar.gz").write_bytes(content)
        content[place] ^= 1
        with pytest.raises(SystemExit, match="flipped.tar.gz is damaged|is not UTF-8"):
            documents("flipped.tar.gz")


@pytest.mark.parametrize("ranges", [True, False])
def test_a_stream_survives_what_goes_wrong_on_the_way(corpus, quick, ranges, capfd):
    texts, content = make_openwebtext(300)
    troubles = random.Random(0)
    kinds = ["cut", "reset", "slow", "stall", 429, 503, "redirect", None]
    if not ranges:  # each body then begins at the beginning, and what is known is skipped
        kinds = ["cut", "reset", "redirect", None]
    happened = []

    def fault():
        happened.append(503 if ranges and len(happened) < 2 else troubles.choice(kinds))
        return happened[-1]

    with Server({"/owt.tar": content}, fault, ranges) as server:
        for _ in range(5):
            assert documents(f"{server.url}/owt.tar") == texts
        Path("list.txt").write_text(f"{server.url}/owt.tar\n{server.url}/owt.tar\n")
        assert documents("list.txt") == texts * 2
    assert set(happened) == set(kinds)
    said = capfd.readouterr().err
    assert re.search(r"owt.tar: broke off at byte [\d,]+ \(.*\); trying again in 0 s", said)
    assert "answers 503; trying again" in said or not ranges


@pytest.mark.parametrize(
    "header", [{"Content-Length": None}, {"Content-Length": "many"}, {"Content-Encoding": "gzip"}]
)
def test_an_answer_that_could_not_be_continued_is_refused(corpus, quick, monkeypatch, header):
    with Server({"/a.txt": b"ba"}, ranges=False) as server:
        answer = server.RequestHandlerClass.answer
        monkeypatch.setattr(
            server.RequestHandlerClass,
            "answer",
            lambda self, status, body, headers, trouble: answer(
                self, status, body, headers | header, trouble
            ),
        )
        with pytest.raises(
            SystemExit, match="the server does not say which part it sends of how long a whole"
        ):
            documents(f"{server.url}/a.txt")


def test_a_file_that_changes_while_it_is_read_is_refused(corpus, quick):
    _, content = make_openwebtext(300)
    files = {"/owt.tar": content}
    with Server(files, lambda: "cut") as server:
        reading = data.read_documents(data_config(f"{server.url}/owt.tar"))
        next(reading)
        files["/owt.tar"] = flip(content, "00-200_data")  # as long as it was: only the ETag tells
        with pytest.raises(SystemExit, match="owt.tar is no longer what it was: its ETag and length"):
            list(reading)


def test_a_file_that_shrank_is_refused_and_an_empty_one_is_empty(corpus, quick):
    _, content = make_openwebtext()
    files = {"/owt.tar": content, "/empty.txt": b""}
    with Server(files) as server:
        address, seen = f"{server.url}/owt.tar", {}
        [*_, (position, _, _)] = data.read_documents(data_config(address), seen=seen)
        files["/owt.tar"] = content[:1000]
        with pytest.raises(SystemExit, match=rf"no longer what it was: .* 1000\], not .* {len(content)}\]"):
            list(data.read_documents(data_config(address), position, seen))
        assert documents(f"{server.url}/empty.txt") == []


def test_openwebtext_is_21_pinned_tars_of_the_hub(monkeypatch):
    files = data.find_files(data_config("openwebtext"))
    assert files == data.find_files(DataConfig()) and len(files) == 21
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror")
    assert data.url_of(files[3]) == (
        "http://mirror/datasets/Skylion007/openwebtext/resolve/"
        "39d1a6d3f3a4c838b27bbc65bfb14a2f6f727740/subsets/urlsf_subset03.tar"
    )
    assert data.identify(files[3]) == [files[3]]  # a mirror is the same corpus


def flip(content, member, before=None):
    """The tar with a byte in the middle of a member changed, or one so far from where its data begins."""
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        at = next(m.offset_data + (before or m.size // 2) for m in tar if member in m.name)
    return content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :]


def damaged_archives():
    _, content = make_openwebtext()
    return {
        "/flipped.tar": (
            flip(content, "00-40_data"),
            "subset00-40_data.xz in .*flipped.tar is damaged or cut short",
        ),
        "/cut.tar": (content[: len(content) // 2], "cut.tar is damaged or cut short"),
        "/header.tar": (
            flip(content, "00-40_data", -300),
            "header.tar is damaged or cut short .no end mark, but",
        ),
        "/long.tar": (
            make_tar({"x_data.xz": make_tar({"a.txt": b"a"}, "w:xz", "n" * (2 << 20))}),
            "x_data.xz in .*long.tar is damaged or cut short .a header of",
        ),
        "/no-end.tar": (content.rstrip(b"\0"), "no-end.tar is damaged or cut short"),
        "/page.tar": (b"<!DOCTYPE html><html>Please log in</html>" * 40, "page.tar is damaged or cut short"),
        "/missing.tar": (
            None,
            "missing.tar cannot be read: it answers 404 Not Found; once it can",
        ),
    }


@pytest.mark.parametrize("path", damaged_archives())
def test_damaged_archives_are_named_after_one_more_request(corpus, quick, path):
    content, message = damaged_archives()[path]
    with Server({path: content} if content else {}) as server:
        with pytest.raises(SystemExit, match=message) as stop:
            documents(server.url + path)
        assert "\n" not in str(stop.value)
        assert len(server.requests) == (2 if content else 1)


def test_no_network_and_a_resource_that_changed_are_told(corpus, quick):
    with pytest.raises(SystemExit, match="7 attempts in a row failed, .*--data python-docs"):
        documents("http://127.0.0.1:9/owt.tar")
    _, content = make_openwebtext()
    files = {"/owt.tar": content}
    with Server(files) as server:
        seen = {}
        next(data.read_documents(data_config(f"{server.url}/owt.tar"), seen=seen))
        assert list(seen.values()) == [[hashlib.md5(content).hexdigest(), len(content)]]
        files["/owt.tar"] = content + b"more"
        with pytest.raises(SystemExit, match="owt.tar is no longer what it was: its ETag and length"):
            list(data.read_documents(data_config(f"{server.url}/owt.tar"), seen=seen))


def test_a_bomb_a_long_line_and_bad_bytes_in_an_archive(corpus, monkeypatch):
    monkeypatch.setattr(data, "MAX_DOCUMENT", 1_000_000)
    bomb = make_tar({"zeros.txt": bytes(50_000_000)}, "w:xz")
    Path("bomb.tar").write_bytes(make_tar({"x_data.xz": bomb}))
    tracemalloc.start()
    with pytest.raises(
        SystemExit, match="zeros.txt in x_data.xz in bomb.tar has a document of over 1,000,000 bytes"
    ):
        documents("bomb.tar")
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()
    Path("latin.tar").write_bytes(make_tar({"l.txt": "né".encode("latin-1")}))
    with pytest.raises(SystemExit, match="l.txt in latin.tar is not UTF-8 at byte 1"):
        documents("latin.tar")
    monkeypatch.setattr(data, "MAX_LINE", 30)
    Path("long.txt").write_text("ba " * 100)
    cache = prepared(data_config("long.txt"))
    assert cache.read_manifest()[0][0]["tokens_kept"] == 10


# ------------------------------------------------------------------------------------------------------------
# data.py and train.py: training while the text arrives


@pytest.fixture
def streaming(corpus, monkeypatch):
    """`corpus` with OpenWebText on a server and a producer of its own; yields (server, arguments)."""
    monkeypatch.undo()
    monkeypatch.chdir(corpus)
    _, content = make_openwebtext()
    troubles = random.Random(0)
    with Server({"/owt.tar": content}, lambda: troubles.choice(["cut", 503, None, None, None])) as server:
        yield server, [*ARGUMENTS, "--data", f"{server.url}/owt.tar"]


def run_killed(command, file, lines):
    """Run until a file has so many lines, and then kill; whether that was in the middle."""
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        found = list(Path(".").glob(file))
        if found and found[0].read_bytes().count(b"\n") >= lines:
            break
        time.sleep(0.002)
    process.kill()
    return process.wait() == -signal.SIGKILL and time.monotonic() < deadline


def test_training_and_producer_killed_in_the_stream_end_in_the_same_bits(streaming):
    server, arguments = streaming
    train.main([*arguments, "--out", "whole"])
    [whole] = Path("cache").glob("owt*")
    command = [sys.executable, str(HERE / "train.py"), *arguments, "--out", "killed", "--cache", "cache2"]
    producer = [
        sys.executable,
        str(HERE / "data.py"),
        "--data",
        f"{server.url}/owt.tar",
        "--vocab",
        "vocab.txt",
    ]
    producer += ["--max-length", "32", "--cache", "cache2"]
    assert run_killed(producer, "cache2/owt*/manifest.jsonl", 3)
    assert run_killed(command, "killed/small/log.jsonl", 7)
    server.requests.clear()
    [late] = Path("cache2").glob("owt*/manifest.jsonl")
    shards = [entry for entry in map(json.loads, late.read_text().splitlines()) if "shard" in entry]
    train.main(command[2:])
    # It asked for the first member that was not yet in a shard, if any.
    assert [asked for _, asked in server.requests][:1] in (
        [],
        [f"bytes={shards[-1]['next'][1] if shards else 0}-"],
    )
    assert final_bytes("killed/small") == final_bytes("whole/small")
    assert read_log("killed/small") == read_log("whole/small")
    [other] = Path("cache2").glob("owt*")
    assert {p.name: p.read_bytes() for p in other.iterdir()} == {
        p.name: p.read_bytes() for p in whole.iterdir()
    }


def test_the_producers_own_sentence_stops_the_training(streaming):
    server, arguments = streaming
    with pytest.raises(SystemExit, match="nothing.tar cannot be read: it answers 404"):
        train.main([*arguments, "--data", f"{server.url}/nothing.tar"])
    assert not Path("out/small/checkpoint.pt").exists()


def test_training_tells_what_the_producer_waits_for(streaming, capfd):
    _, arguments = streaming
    answers = iter([503, 503])  # the first is followed at once, the second after a second
    with Server({"/late.tar": make_openwebtext()[1]}, lambda: next(answers, None)) as server:
        train.main([*arguments, "--data", f"{server.url}/late.tar"])
    assert "/late.tar: it answers 503; trying again in 1 s" in capfd.readouterr().err


def test_no_producer_outlives_its_parent(streaming):
    server, arguments = streaming
    config = data_config(f"{server.url}/owt.tar")
    script = (
        "import sys, data, time\n"
        "config = data.DataConfig(data=sys.argv[1:], vocab='vocab.txt', max_length=32)\n"
        "cache = data.Cache(config, data.load_wordpiece(config))\n"
        "with cache.producing(): print('pid', cache.producer.pid, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, *config.data]
    with subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": str(HERE)}, stdout=subprocess.PIPE
    ) as parent:
        pid = next(int(line[4:]) for line in parent.stdout if line.startswith(b"pid "))
        assert Path(f"/proc/{pid}").exists()
        parent.kill()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/exe").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert time.monotonic() < deadline


def test_training_waits_for_shards_and_a_signal_ends_the_wait(corpus):
    config = data_config()
    cache = prepared(config)
    lines = cache.manifest.read_bytes().splitlines(keepends=True)
    cache.manifest.write_bytes(b"".join(lines[:3]))  # two shards of many
    late = Cache(config, cache.wordpiece)
    said = []
    batches = TrainingRows(late).batches(0, 8, said.append)
    threading.Timer(0.5, lambda: cache.manifest.write_bytes(b"".join(lines))).start()
    waited = list(itertools.islice(batches, 40))
    at_once = list(itertools.islice(TrainingRows(cache).batches(0, 8), 40))
    for (epoch, one), (other_epoch, other) in zip(waited, at_once, strict=True):
        assert epoch == other_epoch and np.array_equal(one, other)
    assert said[:2] == [True, False]
    together = Cache(config, cache.wordpiece)  # many threads may wait on one cache
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: together.read_manifest(), range(200)))
    assert together.shards == cache.read_manifest()[0]
    cache.manifest.write_bytes(b"".join(lines[:3]))
    late = Cache(config, cache.wordpiece)
    late.interrupted.append(signal.SIGINT)
    with pytest.raises(data.Interrupted):
        list(TrainingRows(late).batches(0, 8))


# ------------------------------------------------------------------------------------------------------------
# train.py: optimiser and schedule


def transcription(parameters, gradients, recipe, steps):
    """The official optimiser in NumPy (model/optimization.py), from D24 to D27."""
    values = [p.copy() for p in parameters]
    m, v = [np.zeros_like(p) for p in values], [np.zeros_like(p) for p in values]
    for step in range(steps):
        lr = (
            recipe.learning_rate
            * (1 - step / recipe.num_train_steps)
            * min(1, step / recipe.num_warmup_steps)
        )
        grads = gradients[step]
        norm = math.sqrt(sum((g**2).sum() for g in grads))
        for i, grad in enumerate(grads):
            grad = grad * recipe.max_grad_norm / max(norm, recipe.max_grad_norm)
            m[i] = recipe.adam_beta1 * m[i] + (1 - recipe.adam_beta1) * grad
            v[i] = recipe.adam_beta2 * v[i] + (1 - recipe.adam_beta2) * grad**2
            change = m[i] / (np.sqrt(v[i]) + recipe.adam_epsilon)
            if values[i].ndim > 1:
                change = change + recipe.weight_decay * values[i]
            values[i] = values[i] - lr * change
    return values


def optimise(parameters, gradients, recipe, steps, optimizer=None):
    tensors = [nn.Parameter(torch.from_numpy(p.copy())) for p in parameters]
    optimizer = train.build_optimizer(enumerate(tensors), recipe) if optimizer is None else optimizer(tensors)
    norms = []
    for step in range(steps):
        for tensor, grad in zip(tensors, gradients[step], strict=True):
            tensor.grad = torch.from_numpy(grad.copy())
        lr = train.learning_rate(step, recipe.learning_rate, recipe.num_train_steps, recipe.num_warmup_steps)
        norms.append(train.update(optimizer, lr, recipe.max_grad_norm).item())
    return [tensor.detach().numpy() for tensor in tensors], norms


RECIPE = train.TrainConfig(num_train_steps=40, num_warmup_steps=8, learning_rate=0.01)


def optimiser_input(scale=1.0):
    random_ = np.random.default_rng(0)
    shapes = [(7, 5), (5,), (3, 4)]
    gradients = [[scale * random_.normal(size=shape) for shape in shapes] for _ in range(40)]
    return [random_.normal(size=shape) for shape in shapes], gradients


def test_D24_adam_corrects_no_bias():
    parameters, gradients = optimiser_input()
    ours, _ = optimise(parameters, gradients, RECIPE, 40)
    for one, other in zip(ours, transcription(parameters, gradients, RECIPE, 40), strict=True):
        assert np.abs(one - other).max() < 1e-10
    # With bias correction the first updates are smaller by far.
    constant = [[np.full((1, 1), 0.1)]] * 3
    recipe = replace(RECIPE, weight_decay=0.0, num_warmup_steps=0, num_train_steps=10**9)

    def corrected(tensors):
        group = dict(params=tensors, lr_scale=1.0)
        return torch.optim.AdamW([group], betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0)

    by = [optimise([np.zeros((1, 1))], constant, recipe, 2, kind)[0][0].item() for kind in (None, corrected)]
    assert by[0] / by[1] > 2


def test_D25_decay_is_decoupled_and_spares_vectors():
    parameters, _ = optimiser_input()
    nothing = [[np.zeros_like(p) for p in parameters]] * 40
    recipe = replace(RECIPE, weight_decay=0.1)
    ours, _ = optimise(parameters, nothing, recipe, 20)
    factor = math.prod(1 - 0.1 * train.learning_rate(step, 0.01, 40, 8) for step in range(20))
    assert np.allclose(ours[0], parameters[0] * factor, atol=1e-12) and np.array_equal(ours[1], parameters[1])
    electra = make_electra()
    [decayed, spared] = train.build_optimizer(electra.named_parameters(), RECIPE).param_groups
    names = {id(parameter): name for name, parameter in electra.named_parameters()}
    assert all(
        name.endswith("bias") or "norm" in name.lower() for name in (names[id(p)] for p in spared["params"])
    )
    decayed = [names[id(p)] for p in decayed["params"]]
    assert not any(name.endswith("bias") or "norm" in name.lower() for name in decayed)
    assert "generator.encoder.embeddings.word_embeddings.weight" in decayed


def test_D26_warm_up_multiplies_the_decay():
    rates = [
        train.learning_rate(step, 5e-4, 1_000_000, 10_000) for step in (0, 5_000, 10_000, 500_000, 999_999)
    ]
    assert rates == pytest.approx([0, 5e-4 * 0.995 * 0.5, 5e-4 * 0.99, 2.5e-4, 5e-10], rel=1e-12)
    assert train.learning_rate(0, 1.0, 10, 0) == 1.0


def test_D27_gradients_are_clipped_to_global_norm_1():
    for scale in (10.0, 1e-3):
        parameters, gradients = optimiser_input(scale)
        ours, norms = optimise(parameters, gradients, RECIPE, 10)
        assert norms[0] == pytest.approx(math.sqrt(sum((g**2).sum() for g in gradients[0])), rel=1e-12)
        for one, other in zip(ours, transcription(parameters, gradients, RECIPE, 10), strict=True):
            assert np.abs(one - other).max() < 1e-10


# ------------------------------------------------------------------------------------------------------------
# train.py: figures


def test_area_under_curve_is_the_share_of_ordered_pairs():
    random_ = np.random.default_rng(0)
    for levels in (3, 1000):
        scores, labels = random_.integers(0, levels, 200).astype(float), random_.random(200) < 0.2
        pairs = scores[labels][:, None] - scores[~labels][None]
        assert train.area_under_curve(scores, labels) == pytest.approx(
            ((pairs > 0) + 0.5 * (pairs == 0)).mean()
        )
    assert train.area_under_curve(scores, np.zeros(200, bool)) == 0.5


def test_figures_of_a_batch_by_hand_and_by_parts():
    electra = make_electra().double().eval()
    ids = make_rows(8)
    noise, counts = make_noise(ids), electra.counts(ids)
    with torch.no_grad():
        whole = electra(ids, *noise, counts)
        parts = [
            (electra(*part, counts), part[0], counts)
            for part in zip(ids.split(2), *(n.split(2) for n in noise), strict=True)
        ]
    figures = train.figures(parts)
    tokens, fakes = (ids != 0), whole.is_replaced
    flagged = (whole.disc_logits > 0) & tokens
    rate = fakes.sum() / tokens.sum()
    assert figures["loss"] == pytest.approx(whole.loss.item(), rel=1e-9)
    assert figures["recall"] == pytest.approx((flagged & fakes).sum().item() / fakes.sum().item())
    assert figures["precision"] == pytest.approx(
        (flagged & fakes).sum().item() / max(1, flagged.sum().item())
    )
    assert figures["all_original"] == pytest.approx(
        -(rate * rate.log() + (1 - rate) * (1 - rate).log()).item()
    )
    assert figures["sampled_accuracy"] == pytest.approx(whole.sampled_correct.item() / counts[0].item())


def test_unigram_entropy():
    rows = np.array([[CLS, 150, 150, 151, 152, SEP, 0, 0]])
    assert train.unigram_entropy(rows, CONFIG) == pytest.approx(1.5 * math.log(2))


def test_diagnosis_of_a_stuck_generator_and_a_collapsed_discriminator():
    def lines(mlm_loss, disc_loss, last=25_000):
        return [
            dict(step=step, mlm_loss=mlm_loss, disc_loss=disc_loss, all_original=0.4)
            for step in range(100, last + 1, 100)
        ]

    assert train.diagnose(lines(3.0, 0.3), 10_000) is None
    assert "generator looks stuck" in train.diagnose(lines(6.5, 0.3), 10_000)
    assert "discriminator looks collapsed" in train.diagnose(lines(3.0, 0.39), 10_000)
    assert train.diagnose(lines(6.5, 0.39, last=15_000), 10_000) is None  # early is no cause for alarm
    recovered = lines(3.0, 0.39)
    recovered[-1]["disc_loss"] = 0.3
    assert train.diagnose(recovered, 10_000) is None


# ------------------------------------------------------------------------------------------------------------
# train.py: the run

NETWORK = [
    "--embedding-size",
    "16",
    "--hidden-size",
    "32",
    "--num-hidden-layers",
    "2",
    "--num-attention-heads",
    "2",
    "--intermediate-size",
    "64",
    "--max-position-embeddings",
    "32",
    "--max-length",
    "32",
]
ARGUMENTS = [
    "--data",
    "corpus.txt",
    "--vocab",
    "vocab.txt",
    *NETWORK,
    "--batch-size",
    "8",
    "--num-train-steps",
    "24",
    "--num-warmup-steps",
    "4",
    "--log-every",
    "2",
    "--eval-every",
    "8",
    "--save-every",
    "4",
    "--learning-rate",
    "0.002",
]


def make_run_without_folder():
    run = train.Run.__new__(train.Run)
    run.seed, run.length, run.model_config, run.step = 0, 32, CONFIG, 0
    return run


def read_log(folder="out/small"):
    """Log lines without what cannot be the same twice: rates."""
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


def final_bytes(folder="out/small"):
    return [
        (Path(folder) / name / "model.safetensors").read_bytes() for name in ("discriminator", "generator")
    ]


def test_a_run_logs_learns_and_leaves_models(corpus, capsys):
    train.main([*ARGUMENTS, "--num-train-steps", "150", "--learning-rate", "0.01"])
    header, *lines = read_log()
    steps = [line for line in lines if line["split"] == "train"]
    assert [line["step"] for line in steps] == [1, *range(2, 151, 2)]
    heldout = [line for line in lines if line["split"] == "heldout"]
    assert [line["step"] for line in heldout] == [*range(8, 151, 8), 150]
    assert (
        set(steps[0])
        == set(heldout[0]) | {"lr", "grad_norm"}
        == {
            "split",
            "step",
            "tokens",
            "epoch",
            "lr",
            "loss",
            "mlm_loss",
            "mlm_accuracy",
            "sampled_accuracy",
            "disc_loss",
            "all_original",
            "auc",
            "precision",
            "recall",
            "grad_norm",
        }
    )
    assert steps[0]["tokens"] == 8 * 32 and steps[0]["lr"] == 0 and header["settings"]["batch_size"] == 8
    assert heldout[-1]["mlm_loss"] < heldout[0]["mlm_loss"] - 0.2
    printed = capsys.readouterr().out
    assert "held-out text: MLM loss" in printed and "✗]" in printed and "word frequencies alone" in printed
    discriminator = model.Discriminator(model.load_config("out/small/discriminator"))
    model.load_weights(discriminator, "out/small/discriminator")
    assert discriminator.encoder.embeddings.word_embeddings.weight.shape == (len(SMALL_VOCAB), 16)
    tokenizer = json.loads(Path("out/small/discriminator/tokenizer_config.json").read_text())
    assert tokenizer["do_lower_case"] is True and tokenizer["strip_accents"] is True


def test_an_evaluation_is_on_the_same_rows_and_noise_every_time(corpus):
    train.main([*ARGUMENTS, "--learning-rate", "0"])
    first, *others = [line for line in read_log() if line.get("split") == "heldout"]
    assert others and all(
        other | dict(step=0, tokens=0, epoch=0) == first | dict(step=0, tokens=0, epoch=0) for other in others
    )


KILLED = """
import os, signal, sys
import contextlib
import data, train
data.UNIT_CHARACTERS = 10_000
@contextlib.contextmanager
def producing(cache):
    cache.prepare()
    yield
data.Cache.producing = producing
what, count = sys.argv[1], int(sys.argv[2])
def die_half_way(path):
    real = data.atomic_write(path)
    class Half:
        def __enter__(self):
            file = real.__enter__()
            class Writer:
                def write(self, content):
                    file.write(content[: len(content) // 2]); file.flush()
                    os.kill(os.getpid(), signal.SIGKILL)
            return Writer() if path.name == "checkpoint.pt" and next(calls) == count else file
        def __exit__(self, *error):
            return real.__exit__(*error)
    return Half()
calls = iter(range(1000))
if what == "checkpoint":
    train.atomic_write = die_half_way
elif what == "shard":
    append = data.append
    data.append = lambda *a: append(*a) if next(calls) < count else os.kill(os.getpid(), signal.SIGKILL)
elif what == "step":
    train_step = train.Run.train_step
    def step(self, *args):
        if self.step == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(self, *args)
    train.Run.train_step = step
train.main(sys.argv[3:])
"""


def test_resume_after_sigkill_ends_in_the_same_bits(corpus):
    train.main([*ARGUMENTS, "--out", "whole"])
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    arguments = [*ARGUMENTS, "--out", "killed", "--cache", "cache2"]
    for moment in ("shard", 3), ("step", 6), ("checkpoint", 1), ("step", 13):
        command = [sys.executable, "-c", KILLED, *map(str, moment), *arguments]
        process = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert process.returncode == -signal.SIGKILL, process.stderr
    train.main(arguments)
    assert final_bytes("killed/small") == final_bytes("whole/small")
    assert read_log("killed/small") == read_log("whole/small")


def test_resume_after_ctrl_c_too_and_at_a_step_that_is_not_logged(corpus, monkeypatch):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored
    train.main([*ARGUMENTS, "--out", "whole"])
    train_step = train.Run.train_step

    def step(self, *args):
        if self.step == 6:
            signal.raise_signal(signal.SIGINT)
        return train_step(self, *args)

    monkeypatch.setattr(train.Run, "train_step", step)
    with pytest.raises(SystemExit, match="saved after step 7; the same command goes on"):
        train.main(ARGUMENTS)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    train.main(ARGUMENTS)
    assert final_bytes() == final_bytes("whole/small") and read_log() == read_log("whole/small")
    train.main(ARGUMENTS)  # a finished run only shows its end again
    assert final_bytes() == final_bytes("whole/small") and read_log() == read_log("whole/small")


@pytest.mark.parametrize(
    "change, listed",
    [
        (["--learning-rate", "0.1"], "learning_rate 0.002 there and 0.1 here"),
        (["--seed", "1"], "seed"),
        (["--hidden-size", "16"], "hidden_size"),
        (["--no-do-lower-case"], "do_lower_case"),
        (["--data", "b.txt"], "files"),
    ],
)
def test_another_run_in_the_folder_is_refused_unless_restarted(corpus, change, listed):
    Path("b.txt").write_text("\n\n".join(make_text(50)))
    train.main(ARGUMENTS)
    before = final_bytes(), read_log()
    with pytest.raises(SystemExit, match=f"another run .*{listed}"):
        train.main([*ARGUMENTS, *change])
    assert (final_bytes(), read_log()) == before
    train.main([*ARGUMENTS, *change, "--restart"])
    assert read_log()[0] != before[1][0] and read_log()[-1]["step"] == 24


def test_restart_deletes_what_was_there_but_not_before_the_new_input_is_found_good(corpus, monkeypatch):
    train.main(ARGUMENTS)
    before = final_bytes(), read_log(), Path("out/small/checkpoint.pt").read_bytes()
    Path("empty.txt").write_text("")
    with pytest.raises(SystemExit, match="no text to train on"):
        train.main([*ARGUMENTS, "--restart", "--data", "empty.txt"])
    assert (final_bytes(), read_log(), Path("out/small/checkpoint.pt").read_bytes()) == before
    monkeypatch.setattr(train.Run, "train", lambda self, rows: sys.exit("stopped"))
    with pytest.raises(SystemExit, match="stopped"):
        train.main([*ARGUMENTS, "--restart"])
    assert not Path("out/small/discriminator").exists() and len(read_log()) == 1


@pytest.mark.parametrize(
    "name, flags, message",
    [
        ("out/small/checkpoint.pt", [], "checkpoint.pt is damaged; --restart begins anew"),
        ("cache/*/train-000000.npy", ["--restart"], "a shard of .* is damaged .*; delete the folder"),
    ],
)
def test_damaged_files_of_ours_are_told(corpus, name, flags, message):
    train.main([*ARGUMENTS, "--num-train-steps", "2"])
    [path] = Path(".").glob(name)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(SystemExit, match=message):
        train.main([*ARGUMENTS, "--num-train-steps", "2", *flags])


def test_what_changes_only_the_rounding_may_change_and_is_logged(corpus, monkeypatch):
    monkeypatch.setattr(train.Run, "train", lambda self, rows: None)
    train.main(ARGUMENTS)
    train.main([*ARGUMENTS, "--micro-batch-size", "2", "--log-every", "3"])
    [first, second] = read_log()
    assert first["rounding"] | dict(micro_batch_size=2) == second["rounding"]


def test_every_flag_is_of_one_kind():
    model_names = {field.name for field in fields(ElectraConfig)}
    changes_the_result = model_names | {
        *(
            "size",
            "batch_size",
            "num_train_steps",
            "learning_rate",
            "num_warmup_steps",
            "weight_decay",
            "adam_beta1",
        ),
        *(
            "adam_beta2",
            "adam_epsilon",
            "max_grad_norm",
            "data",
            "one_document_per_file",
            "vocab",
            "do_lower_case",
        ),
        *("strip_accents", "max_length", "seed"),
    }
    names = {
        field.name for config in (train.TrainConfig, DataConfig) for field in fields(config)
    } | model_names
    assert train.ROUNDING | train.NEITHER | changes_the_result == names
    assert not (train.ROUNDING | train.NEITHER) & changes_the_result
    assert not train.ROUNDING & train.NEITHER


def gradients_by_parts(part_size, ids):
    electra = make_electra().double()
    noise, counts = make_noise(ids), electra.counts(ids)
    for part in zip(ids.split(part_size), *(n.split(part_size) for n in noise), strict=True):
        electra(*part, counts).loss.backward()
    return [parameter.grad for parameter in electra.parameters()]


def test_micro_batches_give_the_gradient_of_the_one_batch():
    ids = make_rows(12)
    for part_size in (1, 3, 4):
        for one, other in zip(gradients_by_parts(12, ids), gradients_by_parts(part_size, ids), strict=True):
            assert (one - other).abs().max() < 1e-10


ADAM_FLAGS = (
    "--adam-beta1 0.8 --adam-beta2 0.95 --adam-epsilon 1e-4 --weight-decay 0.2 --max-grad-norm 3".split()
)


def check_adam(optimizer):
    for group in optimizer.param_groups:
        assert group["betas"] == (0.8, 0.95) and group["eps"] == 1e-4
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.2, 0.0}


def test_flags_reach_the_optimiser_and_the_networks_of_pre_training(corpus, monkeypatch):
    runs = []

    def stop(run, input_ids, lr):
        runs.append(run)
        raise SystemExit(0)

    monkeypatch.setattr(train.Run, "train_step", stop)
    shape = "--layer-norm-eps 1e-3 --hidden-dropout-prob 0.3 --attention-probs-dropout-prob 0.4".split()
    with pytest.raises(SystemExit):
        train.main([*ARGUMENTS, *ADAM_FLAGS, *shape])
    [run] = runs
    check_adam(run.optimizer)
    assert run.config.max_grad_norm == 3
    modules = list(run.model.modules())
    assert {module.eps for module in modules if isinstance(module, nn.LayerNorm)} == {1e-3}
    assert {module.p for module in modules if isinstance(module, nn.Dropout)} == {0.3}
    layers = [module for module in modules if isinstance(module, model.Layer)]
    assert {layer.attention_dropout_prob for layer in layers} == {0.4}


def test_micro_batch_flag_changes_a_run_by_rounding_only(corpus):
    calm = [*ARGUMENTS, "--hidden-dropout-prob", "0", "--attention-probs-dropout-prob", "0"]
    train.main([*calm, "--out", "a"])
    train.main([*calm, "--out", "b", "--micro-batch-size", "2"])
    losses = [[line["loss"] for line in read_log(f"{out}/small") if "loss" in line] for out in "ab"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[0] != losses[1]


def test_bf16_and_compile_flags(corpus, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda module, fullgraph: compiled.append(fullgraph) or module)
    train.main([*ARGUMENTS, "--dtype", "bf16", "--compile", "--out", "a"])
    train.main([*ARGUMENTS, "--out", "b"])
    assert compiled == [True]
    losses = [[line["loss"] for line in read_log(f"{out}/small") if "loss" in line] for out in "ab"]
    assert losses[0] == pytest.approx(losses[1], rel=0.1) and losses[0] != losses[1]
    assert read_log("a/small")[0]["rounding"]["dtype"] == "bf16"


def test_cuda_resolves_to_bf16_where_it_is_fast(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    precisions = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", precisions.append)
    for capability, dtype in ((8, 0), "bf16"), ((7, 5), "fp32"):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        assert train.resolve(train.TrainConfig()) == (torch.device("cuda"), dtype)
    assert train.resolve(train.TrainConfig(device="cpu")) == (torch.device("cpu"), "fp32")
    assert precisions == ["high", "high"]


def test_checkpoints_come_after_ten_minutes_too(corpus, monkeypatch):
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    saved, save = [], train.Run.save
    monkeypatch.setattr(train.Run, "save", lambda self: saved.append(self.step) or save(self))
    train.main([*ARGUMENTS, "--save-every", "1000"])
    assert saved == list(range(25))  # at every step, logged or not


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(corpus, monkeypatch):
    train_step = train.Run.train_step

    def step(self, *args):
        if self.step == 9:
            self.model.generator.generator_lm_head["bias"].data[7] = math.nan
        return train_step(self, *args)

    monkeypatch.setattr(train.Run, "train_step", step)
    with pytest.raises(
        SystemExit, match="is not finite after step 10, .* the likely cause is a learning rate"
    ):
        train.main(ARGUMENTS)
    state = torch.load("out/small/checkpoint.pt", weights_only=True)
    assert state["step"] == 8 and all(value.isfinite().all() for value in state["model"].values())
    monkeypatch.setattr(
        train, "figures", lambda parts: {"loss": 1.0}
    )  # and if no figure tells, the weights do
    monkeypatch.setattr(train.Run, "evaluate", lambda *args: "")
    monkeypatch.setattr(train, "update", lambda optimizer, lr, norm: torch.tensor(1.0))
    with pytest.raises(SystemExit, match="a weight is not finite after step 12"):
        train.main(ARGUMENTS)


def test_text_without_held_out_documents_trains_without_evaluation(corpus, capsys):
    texts = [text for text in make_text() if not data.is_heldout(text)]
    Path("corpus.txt").write_text("\n\n".join(texts[:40]))
    train.main(ARGUMENTS)
    assert "no evaluation" in capsys.readouterr().out
    assert {line.get("split") for line in read_log()} == {None, "train"}


# ------------------------------------------------------------------------------------------------------------
# Bad input: one sentence, a non-zero exit, nothing half-written


def bad(name, content=b""):
    def write():
        Path(name).write_bytes(content)
        return ["--data", name]

    return write


def bad_vocab(tokens):
    def write():
        Path("bad.txt").write_text("\n".join(tokens), encoding="utf-8")
        return ["--vocab", "bad.txt"]

    return write


MANY = [*data.SPECIAL_TOKENS, *(f"t{n}" for n in range(65_531))]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "nowhere"], "there is no nowhere"),
        (bad("empty.txt"), "empty.txt holds no text to train on"),
        (bad("blank.txt", b"\n \n\n"), "holds no text to train on"),
        (bad("odd.pdf"), "odd.pdf cannot be read: .txt, .jsonl and .tar can"),
        (lambda: Path("folder").mkdir() or ["--data", "folder"], "folder has no .txt, .jsonl or .tar file"),
        (bad("cut.txt.gz", gzip.compress(b"ba " * 999)[:-9]), "cut.txt.gz is damaged or cut short"),
        (bad("cut.txt.xz", lzma.compress(b"ba " * 999)[:-9]), "cut.txt.xz is damaged or cut short"),
        (bad("not.txt.gz", b"plain text"), "not.txt.gz is damaged"),
        (bad("not.txt.xz", b"plain text"), "not.txt.xz is damaged"),
        (bad("latin.txt", "ba\nbé".encode("latin-1")), "latin.txt is not UTF-8 at byte 4"),
        (
            bad("a.jsonl", b'{"text": "ba"}\n{"no": 1}\n'),
            "a.jsonl, line 2: a line of a .jsonl file must be an object",
        ),
        (bad("b.jsonl", b"{"), "b.jsonl, line 1"),
        (bad_vocab(["[PAD]", "[UNK]", "[CLS]", "a"]), r"lacks \[SEP\], \[MASK\]"),
        (bad_vocab([*data.SPECIAL_TOKENS[1:], "[PAD]", "a"]), r"must begin with \[PAD\]"),
        (bad_vocab([*SMALL_VOCAB, "ba"]), "has a token twice: 'ba'"),
        (bad_vocab(MANY), "has 65,536 tokens"),
        (["--vocab", "nowhere.txt"], "there is no vocabulary nowhere.txt"),
        (["--vocab", "train:70000"], "train:70000 has 70,000 tokens"),
        (["--max-length", "33"], "max_length 33 is over the model's 32 position rows"),
        (["--max-length", "4"], "max_length is 4"),
        (["--micro-batch-size", "3"], "a batch of 8 rows cannot be cut into micro-batches of 3"),
        (["--num-warmup-steps", "-5"], "num_warmup_steps is -5; it must be from 0"),
        (["--learning-rate", "nan"], "learning_rate is nan"),
        (["--adam-beta2", "0.99999"], "adam_beta2 is 0.99999; it must be from 0 to 0.9999"),
        (["--max-grad-norm", "0"], "max_grad_norm is 0.0"),
        (["--hidden-dropout-prob", "2"], "hidden_dropout_prob is 2.0; it must be from 0 to 0.99"),
        (["--mask-prob", "-1"], "mask_prob is -1.0"),
        (["--generator-size", "0"], "generator_size is 0.0"),
        (["--initializer-range", "0"], "initializer_range is 0.0"),
        (["--seed", "99999999999999999999"], "seed must be from 0"),
        (bad("bom.txt", b"\xef\xbb\xbfba\xff"), "bom.txt is not UTF-8 at byte 5"),
        (bad("deep.jsonl", b"[" * 200_000), "deep.jsonl, line 1"),
        (["--batch-size", "0"], "batch_size is 0; it must be from 1 to inf"),
        (["--hidden-size", "33"], "hidden_size 33 cannot be shared by 2 heads"),
        (["--num-attention-heads", "0"], "num_attention_heads is 0"),
        (["--size", "huge"], "there is no size huge; there are tiny, small, base, large"),
        (["--learning", "1"], "unrecognized arguments: --learning 1; --help lists the flags"),
        (["--batch-size", "many"], "invalid int value: 'many'"),
        (["--dtype", "fp8"], "there is no dtype fp8"),
        (["--device", "tpu"], "there is no device tpu here"),
        (["--device", "cuda"], "there is no device cuda here"),
        (["--seed", "-1"], "seed must be from 0"),
    ],
)
def test_bad_input(corpus, arguments, message):
    if "cuda" in arguments if isinstance(arguments, list) else False:
        torch.cuda.is_available() and pytest.skip("there is one")
    arguments = arguments() if callable(arguments) else arguments
    with pytest.raises(SystemExit, match=message) as stop:
        train.main([*ARGUMENTS, *arguments])
    assert stop.value.code and "\n" not in str(stop.value)
    assert not [
        path for path in Path(".").rglob("*") if path.suffix in (".tmp", ".pt") or path.name == "log.jsonl"
    ]
    assert not any(b'"complete"' in path.read_bytes() for path in Path(".").rglob("manifest.jsonl"))


def test_a_line_or_document_without_end_is_refused(corpus, monkeypatch):
    monkeypatch.setattr(data, "MAX_DOCUMENT", 1000)
    for text in ("ba " * 400, "ba\n" * 400):
        Path("long.txt").write_text(text)
        with pytest.raises(SystemExit, match="long.txt has a (line|document) of over 1,000 bytes"):
            documents("long.txt")


@pytest.mark.parametrize("victim", ["train-000002.npy", "manifest.jsonl", "checkpoint.pt", "log.jsonl"])
def test_a_full_disk_stops_with_a_sentence_and_the_same_command_goes_on(corpus, monkeypatch, victim):
    train.main([*ARGUMENTS, "--out", "whole"])
    fsync, calls = os.fsync, itertools.count()

    def full(number):
        name = Path(os.readlink(f"/proc/self/fd/{number}")).name
        if name.startswith(victim) and (victim.startswith("train-") or next(calls) > 2):
            raise OSError(28, "No space left on device", name)
        fsync(number)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit, match="No space left on device; mend that and go on"):
        train.main([*ARGUMENTS, "--cache", "cache2"])
    assert not list(Path(".").rglob("*.tmp"))
    monkeypatch.setattr(os, "fsync", fsync)
    train.main([*ARGUMENTS, "--cache", "cache2"])
    assert final_bytes() == final_bytes("whole/small") and read_log() == read_log("whole/small")


def test_a_folder_in_use_is_refused(corpus):
    Path("out/small").mkdir(parents=True)
    with (
        data.lock(Path("out/small/lock"), ""),
        pytest.raises(SystemExit, match="another process is training in out/small"),
    ):
        train.main(ARGUMENTS)


# ------------------------------------------------------------------------------------------------------------
# glue.py: reading

# A few rows of each file as the official ones are written, with what is odd about them, and what they say.
BOM = "\ufeff"
NLI = "index\tpromptID\tpairID\tgenre\ts1_binary\ts2_binary\ts1_parse\ts2_parse\tsentence1\tsentence2"
GLUE_FILES = {
    ("cola", "train"): (  # no header; quotes are characters
        'gj04\t1\t\tHe said "no.\ngj04\t0\t*\t"Said he" no.\n',
        [('He said "no.', "", 1), ('"Said he" no.', "", 0)],
    ),
    ("cola", "dev"): (
        "bc01\t0\t*\tA b.\nbc01\t1\t\tB a.",
        [("A b.", "", 0), ("B a.", "", 1)],
    ),  # no last "\n"
    ("cola", "test"): ("index\tsentence\n0\tWho?\n", [("Who?", "", None)]),
    ("sst2", "train"): (  # what str.splitlines takes for the end of a line, and a space at the end
        "sentence\tlabel\nso\u2028good \t1\nbad\x85 film\t0\n",
        [("so\u2028good ", "", 1), ("bad\x85 film", "", 0)],
    ),
    ("sst2", "test"): ("index\tsentence\n0\tfine .\n", [("fine .", "", None)]),
    ("mrpc", "train"): (
        BOM + 'Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t10\t11\tHe " won .\tHe did .\n',
        [('He " won .', "He did .", 1)],
    ),
    ("mrpc", "test"): (
        BOM + "index\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t10\t11\tOne .\tTwo .\n",
        [("One .", "Two .", None)],
    ),
    ("stsb", "train"): (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
        "0\tnews\tf\t2012\t1\tnone\tnone\tA plane.\tA jet.\t3.800\n1\tnews\tf\t2012\t2\tx\ty\tA\tB\t5\n",
        [("A plane.", "A jet.", 0.76), ("A", "B", 1.0)],
    ),
    ("stsb", "test"): (  # one column less
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\n"
        "0\tnews\tf\t2012\t1\tnone\tnone\tA\tB\n",
        [("A", "B", None)],
    ),
    ("qqp", "train"): (  # rows that lack fields, and an empty question
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
        "1\t2\t3\tWhy?\tWhy so?\t1\n4\t5\t6\tbroken\n7\t8\t9\tHow?\t\t0\n",
        [("Why?", "Why so?", 1), ("How?", "", 0)],
    ),
    ("qqp", "test"): ("id\tquestion1\tquestion2\n0\tWhy?\tHow?\n", [("Why?", "How?", None)]),
    ("mnli", "train"): (  # the label is the last column, wherever that is
        f"{NLI}\tlabel1\tgold_label\n0\t1\t1n\tgov\t(\t(\t(\t(\tIt is.\tIt may be.\tneutral\tneutral\n",
        [("It is.", "It may be.", 1)],
    ),
    ("mnli", "dev_mismatched"): (
        f"{NLI}\tlabel1\tlabel2\tlabel3\tlabel4\tlabel5\tgold_label\n"
        "0\t1\t1n\tgov\t(\t(\t(\t(\tA\tB\tneutral\tneutral\tentailment\tneutral\tneutral\tcontradiction\n",
        [("A", "B", 2)],
    ),
    ("mnli", "test_matched"): (f"{NLI}\n0\t1\t1n\tgov\t(\t(\t(\t(\tA\tB\n", [("A", "B", None)]),
    ("qnli", "dev"): (
        "index\tquestion\tsentence\tlabel\n0\tWho?\tHe.\tnot_entailment\n1\tWhat?\tIt.\tentailment\n",
        [("Who?", "He.", 1), ("What?", "It.", 0)],
    ),
    ("qnli", "test"): ("index\tquestion\tsentence\n0\tWho?\tHe.\n", [("Who?", "He.", None)]),
    ("rte", "train"): (
        "index\tsentence1\tsentence2\tlabel\n0\tA\tB\tentailment\n",
        [("A", "B", 0)],
    ),
    ("rte", "test"): ("index\tsentence1\tsentence2\n0\tA\tB\n", [("A", "B", None)]),
    ("wnli", "dev"): ("index\tsentence1\tsentence2\tlabel\n0\tA\tB\t1\n", [("A", "B", 1)]),
    ("wnli", "test"): ("index\tsentence1\tsentence2\n0\tA\tB\n", [("A", "B", None)]),
    ("diagnostic", "diagnostic"): (
        "index\tsentence1\tsentence2\n0\tThe cat.\tA cat.\n",
        [("The cat.", "A cat.", None)],
    ),
}


def find(name):
    return glue.DIAGNOSTIC if name == "diagnostic" else glue.TASKS[name]


def write_split(name, split, content, folder="glue"):
    path = Path(folder) / find(name).title / f"{split}.tsv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def expect_rows(monkeypatch, name, split, count):
    monkeypatch.setitem(find(name).rows, split, count)


@pytest.mark.parametrize("name, split", GLUE_FILES)
def test_glue_files_are_read_as_they_are_written(name, split, corpus, monkeypatch, capsys):
    content, expected = GLUE_FILES[name, split]
    write_split(name, split, content)
    expect_rows(monkeypatch, name, split, len(expected))
    examples = glue.read_examples(find(name), split, "cache", "glue")
    assert [tuple(example) for example in examples] == [
        (first, second, pytest.approx(label) if label is not None else None)
        for first, second, label in expected
    ]
    assert ("1 rows that lack fields were skipped" in capsys.readouterr().out) == (
        (name, split) == ("qqp", "train")
    )


STSB_ROW = "0\tnews\tf\t2012\t1\tnone\tnone\tA\tB\t"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("cola", "gj04\t1\t\tA.\n", "CoLA/train.tsv has 1 rows and not 2: it was cut short or edited"),
        ("cola", "gj04\t1\t\tA.\ngj04\t2\t\tB.\n", "train.tsv, line 2: the label is '2' and not one of 0, 1"),
        ("cola", "gj04\t1\t\tA.\ngj04\t1\t\tA\tB.\n", "train.tsv, line 2, has 5 fields where line 1 has 4"),
        ("cola", "gj04\t1\t\tA.\ngj04\t1\n", "train.tsv, line 2, has 2 fields where line 1 has 4"),
        ("cola", "gj04\t1\t\tA.\ngj04\t1\t\tB", "train.tsv does not end with a line break: it was cut short"),
        ("cola", "<html>\n", "train.tsv has 1 columns, too few"),
        ("wnli", "index\tsentence1\tsentence2\tlabel\r\n", r"train.tsv has \\r\\n at its line ends"),
        ("cola", b"gj04\t1\t\tA\xff\n", "train.tsv is not UTF-8 at byte 9"),
        ("sst2", "sentence\tlabel\n" + "A\t1\n" * 400 + "A\t1\r\n", r"line 402: the label is '1\\r'"),
        (
            "stsb",
            "x\t" * 9 + f"x\n{STSB_ROW}5.1\n",
            "line 2: the score is '5.1' and not a number from 0 to 5",
        ),
        ("stsb", "x\t" * 9 + f"x\n{STSB_ROW}high\n", "line 2: the score is 'high'"),
        ("stsb", "x\t" * 9 + f"x\n{STSB_ROW}nan\n", "line 2: the score is 'nan'"),
        (
            "qqp",
            "\t".join("abcdef") + "\n1\t2\t3\tA\tB\t1\tmore\n",
            "line 2, has 7 fields where line 1 has 6",
        ),
        (
            "wnli",
            None,
            "there is no glue/WNLI/train.tsv; --glue-dir takes a folder that holds WNLI/train.tsv",
        ),
    ],
)
def test_glue_files_that_are_not_whole_are_refused(name, content, message, corpus, monkeypatch):
    expect_rows(monkeypatch, name, "train", 2)
    if content is not None:
        write_split(name, "train", content)
    with pytest.raises(SystemExit, match=message):
        glue.read_examples(find(name), "train", "cache", "glue")


def make_zip(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def source(server, path, content):
    return f"{server.url}{path}", len(content), hashlib.sha256(content).hexdigest()


def test_glue_is_downloaded_once_and_read_in_place(corpus, monkeypatch, quick):
    content, _ = GLUE_FILES["wnli", "dev"]
    archive = make_zip({"WNLI/dev.tsv": content})
    expect_rows(monkeypatch, "wnli", "dev", 1)
    with Server({"/WNLI.zip": archive}) as server:
        good = replace(glue.TASKS["wnli"], source=source(server, "/WNLI.zip", archive))
        wrong = replace(good, source=source(server, "/WNLI.zip", archive[:-1] + b"x"))
        with pytest.raises(SystemExit, match=r"SHA-256 [0-9a-f]{64} instead of \d+ bytes with [0-9a-f]{64};"):
            glue.read_examples(wrong, "dev", "cache")
        assert [path.name for path in Path("cache/glue").iterdir()] == ["WNLI.lock"]  # nothing half-written
        assert len(glue.read_examples(good, "dev", "cache")) == 1
        missing = replace(good, source=(f"{server.url}/none.zip", 1, ""))
        with pytest.raises(SystemExit, match="none.zip cannot be read: it answers 404"):
            glue.read_examples(missing, "dev", "cache")
    assert len(glue.read_examples(good, "dev", "cache")) == 1  # the server is gone
    assert {path.name for path in Path("cache/glue").iterdir()} == {"WNLI.zip", "WNLI.lock", "none.lock"}
    kept = Path("cache/glue/WNLI.zip")
    for damaged in archive[: len(archive) // 2], archive.replace(b"WNLI", b"RTE_"), b"":
        kept.write_bytes(damaged)  # or put there by hand
        with pytest.raises(SystemExit, match=r"WNLI.zip has SHA-256 \w{64} instead of \w{64}; delete it"):
            glue.read_examples(good, "dev", "cache")
    kept.unlink()
    with pytest.raises(
        SystemExit,
        match="or put WNLI.zip into cache/glue, or put train.tsv, dev.tsv, test.tsv into DIR/WNLI and take",
    ):
        glue.read_examples(good, "dev", "cache")


def test_glue_splits_mrpc_by_its_dev_ids(corpus, monkeypatch):
    header = BOM + "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    train_ = header + "".join(f"{n % 2}\t{n}\t{n + 1}\tA{n}\tB{n}\n" for n in range(6))
    files = {
        "/train.txt": train_.encode(),
        "/test.txt": (header + "1\t7\t8\tX\tY\n").encode(),
        "/ids.tsv": b"4\t5\n1\t2\n0\t9\n",  # the last pair is of no row
    }
    with Server(files) as server:
        sources = {path: source(server, path, content) for path, content in files.items()}
        monkeypatch.setitem(glue.TASKS, "mrpc", replace(glue.TASKS["mrpc"], source=sources["/train.txt"]))
        monkeypatch.setattr(glue, "MRPC_TEST", sources["/test.txt"])
        monkeypatch.setattr(glue, "MRPC_DEV_IDS", (f"{server.url}/none.tsv", 1, ""))
        with pytest.raises(
            SystemExit, match="or put train.txt, test.txt, none.tsv into cache/glue, or put train"
        ):
            glue.read_examples(glue.TASKS["mrpc"], "train", "cache")
        monkeypatch.setattr(glue, "MRPC_DEV_IDS", sources["/ids.tsv"])
        for split, expected in {"train": [0, 2, 3, 5], "dev": [1, 4]}.items():
            expect_rows(monkeypatch, "mrpc", split, len(expected))
            examples = glue.read_examples(glue.TASKS["mrpc"], split, "cache")
            assert examples == [(f"A{n}", f"B{n}", n % 2) for n in expected]
        expect_rows(monkeypatch, "mrpc", "test", 1)
        assert glue.read_examples(glue.TASKS["mrpc"], "test", "cache") == [("X", "Y", None)]


# ------------------------------------------------------------------------------------------------------------
# glue.py: metrics and submission


def metric_inputs():
    random_ = np.random.default_rng(0)
    for size in 2, 3, 10, 500:
        for _ in range(5):
            yield random_.integers(0, 2, size), random_.integers(0, 2, size)
    yield np.zeros(5, int), np.array([0, 1, 0, 1, 1])
    yield np.array([0, 1, 0, 1, 1]), np.ones(5, int)
    yield np.ones(4, int), np.ones(4, int)
    yield np.zeros(4, int), np.zeros(4, int)
    yield np.zeros(4, int), np.ones(4, int)


@pytest.mark.filterwarnings("ignore")  # scikit-learn's own, where a metric is 0 / 0
def test_metric_of_classes_agree_with_scikit_learn():
    for predictions, labels in metric_inputs():
        assert glue.accuracy(predictions, labels) == pytest.approx(
            sklearn.metrics.accuracy_score(labels, predictions)
        )
        assert glue.f1(predictions, labels) == pytest.approx(
            sklearn.metrics.f1_score(labels, predictions, zero_division=0)
        )
        assert glue.METRICS["matthews"](predictions, labels) == pytest.approx(
            sklearn.metrics.matthews_corrcoef(labels, predictions), abs=1e-12
        )


def test_metric_of_numbers_agree_with_scipy():
    random_ = np.random.default_rng(0)
    for size in 3, 10, 1000:
        for places in None, 1, 0:  # with more and more ties
            one, other = random_.normal(size=size).astype(np.float32), random_.random(size)
            one, other = (one, other) if places is None else (one.round(places), other.round(places))
            if np.ptp(one) and np.ptp(other):
                assert glue.pearson(one, other) == pytest.approx(stats.pearsonr(one, other)[0], abs=1e-6)
                assert glue.spearman(one, other) == pytest.approx(stats.spearmanr(one, other)[0], abs=1e-12)
    assert data.ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1, 3.5, 2]
    constant = np.full(7, 0.1, np.float32)
    assert glue.pearson(constant, np.arange(7)) == glue.spearman(np.arange(7), constant) == 0.0


def test_averages_are_those_of_electra_and_of_glue():
    # ELECTRA-Small-OWT's published figures, whose average is 80.36.
    figures = {
        "cola": {"matthews": 56.8},
        "sst2": {"accuracy": 88.3},
        "mrpc": {"accuracy": 87.4, "f1": 90.4},
        "stsb": {"spearman": 86.8, "pearson": 87.0},
        "qqp": {"accuracy": 88.3, "f1": 85.3},
        "mnli": {"accuracy": 78.9, "mismatched accuracy": 79.9},
        "qnli": {"accuracy": 87.9},
        "rte": {"accuracy": 68.5},
        "wnli": {"accuracy": 56.3},
    }
    assert glue.average_of_8(figures) == pytest.approx(80.36, abs=0.01)
    by_task = [56.8, 88.3, 88.9, 86.9, 86.8, 79.4, 87.9, 68.5, 56.3]
    assert glue.average_of_9(figures) == pytest.approx(sum(by_task) / 9)


def test_scores_of_a_task_are_named():
    right, wrong = np.array([0, 2, 1, 1]), np.array([0, 0, 1, 0])
    mnli = glue.score(
        glue.TASKS["mnli"],
        {"dev_matched": right, "dev_mismatched": wrong},
        {"dev_matched": right, "dev_mismatched": right},
    )
    assert mnli == {"accuracy": 1.0, "mismatched accuracy": 0.5}
    assert list(glue.score(glue.TASKS["mrpc"], {"dev": wrong}, {"dev": wrong})) == ["accuracy", "f1"]
    # CoLA's baseline is another than accuracy's
    assert glue.score(glue.TASKS["cola"], {"dev": np.zeros(4)}, {"dev": wrong}) == {"matthews": 0.0}


def test_D31_submitted_scores_are_times_five_clipped_and_have_three_decimals():
    text = glue.submission_file(glue.TASKS["stsb"], np.array([0.25, -0.1, 1.2, 0.7654321], np.float32))
    assert text == "index\tprediction\n0\t1.250\n1\t0.000\n2\t5.000\n3\t3.827\n"


def test_submission_is_eleven_files_byte_by_byte(tmp_path):
    labels = np.array([0, 1, 0])
    expected = {"STS-B.tsv": ["0.000", "5.000", "0.000"]}
    for name in "CoLA", "SST-2", "MRPC", "QQP", "WNLI":
        expected[f"{name}.tsv"] = ["0", "1", "0"]
    for name in "MNLI-m", "MNLI-mm", "AX":
        expected[f"{name}.tsv"] = ["entailment", "neutral", "entailment"]
    for name in "QNLI", "RTE":
        expected[f"{name}.tsv"] = ["entailment", "not_entailment", "entailment"]
    for path in tmp_path / "1.zip", tmp_path / "2.zip":
        glue.write_submission(path, dict.fromkeys(expected, labels))
    assert (tmp_path / "1.zip").read_bytes() == (tmp_path / "2.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "1.zip") as archive:
        assert set(archive.namelist()) == set(expected) and len(expected) == 11
        for name, words in expected.items():
            lines = "".join(f"{index}\t{word}\n" for index, word in enumerate(words))
            assert archive.read(name) == b"index\tprediction\n" + lines.encode()


# ------------------------------------------------------------------------------------------------------------
# finetune.py: rows, network, recipe

FINETUNED = ElectraConfig(**SHAPE | dict(vocab_size=len(SMALL_VOCAB)))


@pytest.mark.parametrize(
    "first, second, length, expected",
    [
        ([1, 2, 3], [4], 4, ([1, 2, 3], [4])),
        ([1, 2, 3, 4, 5], [6, 7], 4, ([1, 2], [6, 7])),
        ([1, 2], [3, 4, 5, 6], 4, ([1, 2], [3, 4])),
        ([1, 2, 3], [4, 5, 6], 5, ([1, 2, 3], [4, 5])),  # a tie: the second loses
        ([1, 2, 3], [4, 5, 6], 4, ([1, 2], [4, 5])),
        ([1, 2, 3], [], 2, ([1, 2], [])),
    ],
)
def test_D05_the_longer_sentence_is_cut_first_and_of_equals_the_second(first, second, length, expected):
    assert finetune.truncate(first, second, length) == expected


def test_D05_rows_of_one_sentence_and_of_two():
    wordpiece = WordPiece(SMALL_VOCAB)  # [CLS] is 2, [SEP] is 3
    ids = [wordpiece.encode([word])[0][0] for word in ("ba", "do", "ku")]
    a, b, c = ids
    examples = [
        glue.Example("ba do", "ku", 0),
        glue.Example("ba do ku", "", 1),  # an empty second sentence makes it an example of one
        glue.Example("ba do ku ba do ku", "do do do", 1),
        glue.Example("ba do ku ba do ku", "", 1),
    ]
    rows, labels = finetune.build_rows(examples, wordpiece, 8)
    assert [row.tolist() for row in rows] == [
        [2, a, b, 3, c, 3],
        [2, a, b, c, 3],
        [2, a, b, c, 3, b, b, 3],
        [2, a, b, c, a, b, c, 3],
    ]
    assert labels.tolist() == [0, 1, 1, 1]
    assert finetune.pad(rows[:2]).tolist() == [[2, a, b, 3, c, 3], [2, a, b, c, 3, 0]]


def test_D30_both_orders_are_swapped_before_they_are_cut():
    wordpiece = WordPiece(SMALL_VOCAB)
    [[a, b, c]] = wordpiece.encode(["ba do ku"])
    rows, labels = finetune.build_rows(
        [glue.Example("ba ba ba", "do do ku", 0.2)], wordpiece, 8, both_orders=True
    )
    assert [row.tolist() for row in rows] == [[2, a, a, a, 3, b, b, 3], [2, b, b, c, 3, a, a, 3]]
    assert labels.tolist() == [0.2, 0.2]
    assert [name for name, task in glue.TASKS.items() if task.both_orders] == ["mrpc", "stsb"]


@pytest.mark.parametrize(
    "layers, decay, expected",
    [
        (12, 0.8, {"classifier.weight": 1, "classifier.bias": 1, "encoder.layers.11.output.weight": 0.8**2,
                   "encoder.layers.10.output_norm.bias": 0.8**3,
                   "encoder.layers.0.query_key_value.weight": 0.8**13,
                   "encoder.embeddings_project.weight": 0.8**14,
                   "encoder.embeddings.word_embeddings.weight": 0.8**14}),
        (24, 0.9, {"encoder.layers.23.output.weight": 0.9**2, "encoder.embeddings.LayerNorm.bias": 0.9**26}),
    ],
)  # fmt: skip
def test_D28_layerwise_learning_rates(layers, decay, expected):
    for name, share in expected.items():
        assert finetune.lr_scale(name, layers, decay) == pytest.approx(share)


def test_D28_every_parameter_moves_by_its_share_of_the_rate():
    torch.manual_seed(0)
    network = finetune.Classifier(NO_DROPOUT, 2)
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    config = finetune.FinetuneConfig(weight_decay=0.5)
    optimizer = train.build_optimizer(
        network.named_parameters(), config, lambda name: finetune.lr_scale(name, 2, 0.8)
    )
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    train.update(optimizer, 1e-3, 1e9)
    for name, parameter in network.named_parameters():
        depth = 4 if "classifier" in name else 0 if "embeddings" in name else int(name.split(".")[2]) + 1
        lr = 1e-3 * 0.8 ** (4 - depth)
        decayed = before[name] * (1 - lr * 0.5 * (parameter.ndim > 1))
        step = lr * 0.1 / (math.sqrt(0.001) + 1e-6)  # Adam's first, without correction of the bias
        assert torch.allclose(parameter, decayed - step, rtol=1e-5, atol=1e-8), name


def test_D29_the_classifier_is_dropout_and_one_layer_on_cls(tmp_path):
    torch.manual_seed(0)
    discriminator = model.Discriminator(FINETUNED.discriminator())
    model.save_pretrained(discriminator, FINETUNED.discriminator(), tmp_path, SMALL_VOCAB, True, True)
    network = finetune.Classifier(FINETUNED, 3)
    bound = math.sqrt(6 / (48 + 3))  # Glorot
    assert 0.8 * bound < network.classifier.weight.abs().max() <= bound and not network.classifier.bias.any()
    model.load_weights(network, tmp_path, encoder_only=True)
    assert {name for name, _ in network.named_parameters() if not name.startswith("encoder.")} == {
        "classifier.weight",
        "classifier.bias",
    }
    ids = torch.tensor([[2, 7, 8, 3, 9, 3, 0, 0]])
    network.eval(), discriminator.eval()
    hidden = discriminator.encoder(ids, *model.attention_mask_and_token_types(ids, 3))
    expected = F.linear(hidden[:, 0], network.classifier.weight, network.classifier.bias)
    assert torch.equal(network(ids, 3), expected)
    assert network.dropout.p == 0.1
    network.train()
    network.encoder.eval()
    seen = {tuple((network(ids, 3) - expected).tolist()[0]) for _ in range(5)}
    assert len(seen) > 1  # it is dropout that differs


def test_D31_the_loss_of_a_score_is_the_squared_error_of_the_number_itself():
    logits, labels = torch.tensor([[0.5], [-2.0]]), torch.tensor([0.2, 1.0])
    assert torch.allclose(finetune.losses(logits, labels, glue.TASKS["stsb"]), torch.tensor([0.09, 9.0]))
    logits, labels = torch.tensor([[0.5, 1.5]]), torch.tensor([1])
    assert finetune.losses(logits, labels, glue.TASKS["cola"]).item() == pytest.approx(
        math.log(1 + math.exp(-1))
    )


def test_D32_steps_of_every_task():
    steps = {
        name: finetune.num_steps(task.rows["train"] * (1 + task.both_orders), 32, task.num_train_epochs)
        for name, task in glue.TASKS.items()
    }
    assert steps == {
        "cola": 804, "sst2": 6315, "mrpc": 690, "stsb": 3600, "qqp": 34113, "mnli": 36816, "qnli": 9822,
        "rte": 780, "wnli": 60,
    }  # fmt: skip


@pytest.fixture
def toy_glue(corpus, monkeypatch):
    """`corpus` with a small model in out/small and toy tasks in glue/: what matters is one word."""
    torch.manual_seed(0)
    discriminator = model.Discriminator(FINETUNED.discriminator())
    model.save_pretrained(
        discriminator, FINETUNED.discriminator(), "out/small/discriminator", SMALL_VOCAB, True, True
    )
    random_ = random.Random(0)
    for name in [*glue.TASKS, "diagnostic"]:
        task = find(name)
        for split in task.rows:
            # Test sets of different sizes, so that none can be taken for another.
            count = {"train": 48, "test_mismatched": 13, "diagnostic": 14}.get(split, 12)
            expect_rows(monkeypatch, name, split, count)
            is_test = split in task.submissions
            lines = [] if not (task.header or is_test) else ["\t".join("h" * 12)]
            for _ in range(count):
                fields, label = ["x"] * 12, random_.randrange(max(2, len(task.labels)))
                for column in task.test_sentences if is_test else task.sentences:
                    words = random_.choices(WORDS[8:], k=random_.randint(2, 9))
                    fields[column] = " ".join([*words, WORDS[label]])
                if not is_test:
                    fields[task.label] = task.labels[label] if task.labels else str(5 * label)
                lines.append("\t".join(fields))
            write_split(name, split, "\n".join(lines) + "\n")
    return ["--glue-dir", "glue", "--max-length", "32", "--batch-size", "8"]


def read_results(folder="out/glue"):
    return {
        (entry["task"], entry["seed"]): entry
        for entry in map(json.loads, (Path(folder) / "results.jsonl").read_text().splitlines())
    }


TIMES = {"seconds", "examples_per_second", "finished"}


def without_times(entry):
    return {key: value for key, value in entry.items() if key not in TIMES}


def test_D32_the_rate_of_every_step(toy_glue, monkeypatch):
    rates, sizes, update, losses = [], [], finetune.update, finetune.losses
    monkeypatch.setattr(finetune, "update", lambda o, lr, norm: rates.append(lr) or update(o, lr, norm))
    monkeypatch.setattr(finetune, "losses", lambda *batch: sizes.append(len(batch[1])) or losses(*batch))
    finetune.main([*toy_glue, "--task", "cola", "--batch-size", "20"])
    total, warmup = 9, 0.9  # which is not rounded
    expected = [3e-4 * (1 - step / total) * min(1, step / warmup) for step in range(total)]
    assert rates == pytest.approx(expected) and sizes == [20, 20, 8] * 3


def test_D33_weight_decay_is_off_by_default():
    assert finetune.FinetuneConfig().weight_decay == 0.0 and train.TrainConfig().weight_decay == 0.01
    torch.manual_seed(0)
    network = finetune.Classifier(NO_DROPOUT, 2)
    optimizer = train.build_optimizer(network.named_parameters(), finetune.FinetuneConfig())
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0]


def test_flags_reach_the_optimiser_and_the_schedule_of_fine_tuning(toy_glue, monkeypatch):
    rates, update = [], finetune.update

    def watch(optimizer, lr, max_grad_norm):
        check_adam(optimizer)
        assert max_grad_norm == 3
        rates.append(lr)
        return update(optimizer, lr, max_grad_norm)

    monkeypatch.setattr(finetune, "update", watch)
    flags = ["--warmup-proportion", "0.5", "--num-train-epochs", "1", "--learning-rate", "1e-3"]
    finetune.main([*toy_glue, "--task", "cola", *ADAM_FLAGS, *flags])
    assert rates == pytest.approx([1e-3 * (1 - step / 6) * min(1, step / 3) for step in range(6)])


def test_D34_the_loss_is_summed_over_the_batch(toy_glue, monkeypatch):
    batches, gradients, update, losses = [], [], finetune.update, finetune.losses

    def watch(optimizer, lr, max_grad_norm):
        [bias] = [p for group in optimizer.param_groups for p in group["params"] if p.shape == (3,)]
        gradients.append(bias.grad.clone())
        return update(optimizer, lr, max_grad_norm)

    monkeypatch.setattr(finetune, "update", watch)
    monkeypatch.setattr(finetune, "losses", lambda *batch: batches.append(batch[:2]) or losses(*batch))
    finetune.main([*toy_glue, "--task", "mnli", "--num-train-epochs", "1", "--batch-size", "20"])
    assert len(gradients) == 3
    for (logits, labels), gradient in zip(batches, gradients, strict=True):
        # Of a sum of cross-entropies by the bias of the last layer.
        expected = (logits.detach().softmax(1) - F.one_hot(labels, 3)).sum(0)
        assert torch.allclose(gradient, expected, atol=1e-5)


def test_padding_to_the_longest_row_changes_no_logit():
    torch.manual_seed(0)
    network = finetune.Classifier(NO_DROPOUT, 2).eval()
    rows = [[CLS, 5, 6, SEP], [CLS, *range(5, 12), SEP, 7, SEP]]
    own = network(finetune.pad(rows), SEP)
    wide = network(finetune.pad([*rows, [CLS] * 40])[:2], SEP)
    alone = torch.cat([network(finetune.pad([row]), SEP) for row in rows])
    assert torch.allclose(own, wide, atol=1e-6) and torch.allclose(own, alone, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------
# finetune.py: the sweep


def test_a_separable_task_is_learnt_to_100_percent(toy_glue, capsys):
    finetune.main([*toy_glue, "--task", "sst2", "rte", "--num-train-epochs", "40", "--learning-rate", "1e-3"])
    metrics = {name: entry["metrics"] for (name, _), entry in read_results().items()}
    assert metrics == {"sst2": {"accuracy": 1.0}, "rte": {"accuracy": 1.0}}
    assert re.search(r"SST-2 +accuracy\* +1 +100.00 +- +100.00 +100.00", capsys.readouterr().out)


def test_a_seed_gives_the_same_figures_alone_or_among_others(toy_glue):
    common = [*toy_glue, "--num-train-epochs", "2", "--predict"]
    finetune.main([*common, "--task", "all", "--seeds", "2"])
    finetune.main([*common, "--task", "stsb", "--seeds", "2", "--out", "alone"])
    together, alone = read_results(), read_results("alone")
    assert len(together) == 18 and set(alone) == {("stsb", 0), ("stsb", 1)}
    assert alone["stsb", 0]["metrics"] != alone["stsb", 1]["metrics"]
    for key, entry in alone.items():
        assert without_times(entry) == without_times(together[key])
        [one], [other] = (
            list(Path(folder, "predictions").glob(f"{key[0]}-{key[1]}-*")) for folder in ("alone", "out/glue")
        )
        assert one.name == other.name and one.read_bytes() == other.read_bytes()


def test_what_is_finished_is_kept_and_shared(toy_glue, capsys, monkeypatch):
    common = [*toy_glue, "--task", "cola", "WNLI", "--num-train-epochs", "1"]
    finetune.main(common)
    path = Path("out/glue/results.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 2
    said = capsys.readouterr().out
    assert re.search(r"^CoLA, seed 0, \d+ s: matthews -?[\d.]+, mean of 1 -?[\d.]+$", said, re.M)
    path.write_bytes(lines[0] + lines[1][:50])  # a kill tore the second
    finetune.main(common)
    again = path.read_bytes().splitlines(keepends=True)
    assert again[0] == lines[0] and without_times(json.loads(again[1])) == without_times(json.loads(lines[1]))
    capsys.readouterr()
    monkeypatch.setattr(finetune, "finetune", None)  # nothing is done again
    finetune.main(common)
    assert "CoLA" in capsys.readouterr().out and path.read_bytes() == b"".join(again)
    for damage, message in (b"{}", "is not a result"), (b"[", "is damaged"), (b"7", "is not a result"):
        path.write_bytes(again[0] + damage + b"\n" + again[1])
        with pytest.raises(
            SystemExit, match=f"results.jsonl, line 2, {message}; delete that line, and its seed"
        ):
            finetune.main(common)


def test_other_settings_are_other_results(toy_glue):
    common = [*toy_glue, "--task", "wnli", "--num-train-epochs", "1"]
    for flags in [], ["--learning-rate", "1e-3"], ["--random-weights"], ["--layerwise-lr-decay", "1"]:
        finetune.main([*common, *flags])
    lines = Path("out/glue/results.jsonl").read_text().splitlines()
    settings = [json.loads(line)["settings"] for line in lines]
    assert len(lines) == 4 and len({json.dumps(one) for one in settings}) == 4
    assert [one["weights"] == "random" for one in settings] == [False, False, True, False]


SHARED_SWEEP = """
import json, sys
import finetune, glue
for name, rows in json.loads(sys.argv[1]).items():
    glue.TASKS[name].rows.update(rows)
finetune.main(sys.argv[2:])
"""


def test_processes_share_a_sweep_and_one_takes_over_what_a_killed_one_left(toy_glue):
    rows = json.dumps({name: task.rows for name, task in glue.TASKS.items()})
    flags = ["--task", "wnli", "rte", "--seeds", "3", "--num-train-epochs", "8"]
    command = [sys.executable, "-c", SHARED_SWEEP, rows, *toy_glue, *flags]
    environment = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    first, second = (subprocess.Popen(command, **pipes) for _ in range(2))
    path = Path("out/glue/results.jsonl")
    while not path.exists() and first.poll() is None:
        time.sleep(0.01)
    first.kill()
    first.communicate()
    said, _ = second.communicate(timeout=120)
    assert second.returncode == 0
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted((line["task"], line["seed"]) for line in lines) == [
        (name, seed) for name in ("rte", "wnli") for seed in range(3)
    ]
    assert re.search(r"^RTE +accuracy\* +3 ", said, re.M) and re.search(r"^WNLI +accuracy +3 ", said, re.M)


def test_a_seed_in_hand_elsewhere_is_waited_for(toy_glue, capsys):
    flags = [*toy_glue, "--task", "wnli", "--seeds", "2", "--num-train-epochs", "1"]
    sweep = finetune.Sweep(
        finetune.FinetuneConfig(
            task=["wnli"], glue_dir="glue", max_length=32, batch_size=8, num_train_epochs=1
        )
    )
    claim = data.lock(sweep.folder / "locks" / f"wnli-0-{data.digest(sweep.settings('wnli'))}")
    claim.__enter__()
    done_first = []

    def let_go():
        while not sweep.path.exists():
            time.sleep(0.01)
        done_first.extend(read_results())
        time.sleep(0.3)
        claim.__exit__(None, None, None)

    other = threading.Thread(target=let_go)
    other.start()
    finetune.main(flags)
    other.join()
    assert done_first == [("wnli", 1)] and set(read_results()) == {("wnli", 0), ("wnli", 1)}
    assert "waiting for another process to finish seed 0 of WNLI" in capsys.readouterr().err


def test_a_seed_that_diverges_is_kept_and_marked(toy_glue, capsys):
    finetune.main([*toy_glue, "--task", "cola", "--learning-rate", "1e3", "--num-train-epochs", "2"])
    said = capsys.readouterr().out
    assert "CoLA: the predictions are not finite; try a lower --learning-rate" in said
    assert "CoLA: seed 0 gave one answer to every example" in said
    finetune.main([*toy_glue, "--task", "wnli", "--num-train-epochs", "20", "--learning-rate", "1e-3"])
    assert {task: entry["is_constant"] for (task, _), entry in read_results().items()} == {
        "cola": True,
        "wnli": False,
    }
    finetuned = finetune.Model(finetune.FinetuneConfig(max_length=32))
    network = finetuned.classifier(1)
    nn.init.constant_(network.classifier.bias, math.nan)
    assert finetune.predict(network, [[2, 7, 3]] * 3, finetuned, glue.TASKS["stsb"]).tolist() == [0.0] * 3


def test_predictions_are_made_without_dropout(toy_glue):
    finetuned = finetune.Model(finetune.FinetuneConfig(max_length=32))
    assert finetuned.shape.hidden_dropout_prob == 0.1
    network = finetuned.classifier(1).train()
    rows = [np.array(row, np.uint16) for row in ([2, 7, 3], [2, 9, 8, 7, 3], [2, 8, 3])]
    first, second = (finetune.predict(network.train(), rows, finetuned, glue.TASKS["stsb"]) for _ in range(2))
    alone = [finetune.predict(network, [row], finetuned, glue.TASKS["stsb"])[0] for row in rows]
    assert np.array_equal(first, second) and np.allclose(first, alone, atol=1e-6)


def test_the_table_says_what_papers_print(capsys):
    def entry(is_constant=False, **metrics):
        return dict(metrics=metrics, is_constant=is_constant, seed=0)

    config = finetune.FinetuneConfig(task=["mrpc", "wnli", "cola"])
    results = {("mrpc", seed): entry(accuracy=a, f1=0.9) for seed, a in enumerate([0.8, 0.9, 0.82])}
    results["wnli", 0] = entry(accuracy=0.5)
    results["cola", 0] = entry(True, matthews=0.0)
    text = finetune.table(results, config)
    assert re.search(r"^MRPC +accuracy\* +3 +84.00 +5.29 +82.00 +90.00$", text, re.M)
    assert re.search(r"^MRPC +f1 +3 +90.00 +0.00 +90.00 +90.00$", text, re.M)
    assert re.search(r"^WNLI +accuracy +1 +50.00 +- +50.00 +50.00$", text, re.M)
    assert "CoLA: seed 0 gave one answer to every example, which is counted as it is" in text
    assert "averag" not in finetune.table(results, finetune.FinetuneConfig(task=["mrpc"]))
    assert "average of 8 (* each; no WNLI): not without SST-2, STS-B, QQP, MNLI, QNLI, RTE" in text
    assert "WNLI's dev set is adversarial" in text
    full = {(name, seed): entry(**dict.fromkeys(task.metrics, 0.7 + 0.1 * (seed > 1)))
            for name, task in glue.TASKS.items() for seed in range(3)}  # fmt: skip
    text = finetune.table(full, finetune.FinetuneConfig())
    assert "no WNLI): 73.33 from means, 70.00 from medians" in text
    assert "averaged first): 73.33 from means, 70.00 from medians" in text


def test_submission_from_the_best_seeds(toy_glue, capsys):
    common = [*toy_glue, "--num-train-epochs", "1", "--seeds", "2"]
    finetune.main([*common, "--task", "all"])
    capsys.readouterr()
    finetune.main([*common, "--submit"])  # needs predictions, so what lacks them is done again
    said = capsys.readouterr().out
    results = read_results()
    with zipfile.ZipFile("out/glue/submission.zip") as archive:
        assert len(archive.namelist()) == 11
        for name, task in glue.TASKS.items():
            metric = task.metrics[0]
            best = max((0, 1), key=lambda seed: results[name, seed]["metrics"][metric])
            assert f"{task.title} seed {best} (" in said
            [kept] = Path("out/glue/predictions").glob(f"{name}-{best}-*.npz")
            files = np.load(kept)
            assert set(files) == set(task.submissions.values()) | ({"AX.tsv"} if name == "mnli" else set())
            for file in files:
                assert archive.read(file).decode() == glue.submission_file(task, files[file])
        lengths = {file: archive.read(file).count(b"\n") - 1 for file in archive.namelist()}
        assert lengths == dict.fromkeys(lengths, 12) | {"MNLI-mm.tsv": 13, "AX.tsv": 14}


@pytest.mark.parametrize("names", [["model.safetensors", "tokenizer_config.json"], ["pytorch_model.bin"]])
def test_a_model_of_the_hub_is_downloaded_once(toy_glue, monkeypatch, quick, names):
    folder = Path("out/small/discriminator")
    tensors = model.read_safetensors(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    base = "/google/electra-toy/resolve/main/"
    files = {f"{base}{name}": (folder / name).read_bytes() for name in ["config.json", "vocab.txt", *names]}
    command = [*toy_glue, "--task", "wnli", "--num-train-epochs", "1", "--model", "google/electra-toy"]
    with Server({}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        with pytest.raises(
            SystemExit,
            match="404 .*; try again, or check the name, as there is no folder google/electra-toy here",
        ):
            finetune.main(command)
    with Server(files | {f"{base}config.json": b"<html>Please log in</html>"}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        with pytest.raises(SystemExit, match="config.json is not a JSON object"):
            finetune.main(command)
    assert [path.suffix for path in Path("cache/models").iterdir()] == [".lock"]  # nothing bad is kept
    with Server(files) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        finetune.main(command)
    kept = {path.name for path in Path("cache/models/google--electra-toy").iterdir()}
    assert kept == {"config.json", "vocab.txt", *names}
    finetune.main([*command, "--out", "again"])  # the server is gone
    finetune.main([*toy_glue, "--task", "wnli", "--num-train-epochs", "1", "--out", "local"])
    assert (
        read_results()["wnli", 0]["metrics"]
        == read_results("again")["wnli", 0]["metrics"]
        == read_results("local")["wnli", 0]["metrics"]
    )


def test_case_and_accents_come_from_the_folder(toy_glue):
    path = Path("out/small/discriminator/tokenizer_config.json")
    for settings, expected in (
        ({"do_lower_case": False}, (False, False)),
        ({"do_lower_case": True, "strip_accents": False}, (True, False)),
        ({"strip_accents": None}, (True, True)),
        (None, (True, True)),
    ):
        path.unlink(missing_ok=True)
        if settings is not None:
            path.write_text(json.dumps(settings))
        wordpiece = finetune.read_tokenizer(path.parent)
        assert (wordpiece.do_lower_case, wordpiece.strip_accents) == expected
    path.write_text(json.dumps({"do_lower_case": False, "strip_accents": True}))
    with pytest.raises(SystemExit, match="asks for what this tokenizer does not do: do_lower_case False"):
        finetune.read_tokenizer(path.parent)


TOKENIZER = "tokenizer_config.json"


def spoil(name, change):
    def apply():
        path = Path("out/small/discriminator") / name
        change(path)
        return []

    return apply


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--task", "squad"], "there is no task squad; there are cola, sst2, mrpc, .* wnli and all"),
        (["--model", "nowhere"], "there is no model in nowhere: pre-train one with .*google/electra-small"),
        (["--model", "out/none"], "there is no model in out/none"),
        (["--model", "out"], "there is no model in out, but in out/small"),
        (["--model", "glue"], "there is no model in glue"),
        (spoil("config.json", Path.unlink), "there is no model in out/small: pre-train one"),
        (spoil("config.json", lambda p: p.write_text("{")), "config.json is not a JSON object"),
        (spoil("model.safetensors", Path.unlink), "neither model.safetensors nor pytorch_model.bin"),
        (spoil("model.safetensors", lambda p: p.write_bytes(b"x" * 99)), "is not a safetensors file"),
        (spoil(TOKENIZER, lambda p: p.write_text("7")), "tokenizer_config.json is not a JSON object"),
        (spoil("vocab.txt", lambda p: p.write_text("\n".join(SMALL_VOCAB[:-1]))),
         "contradicts itself: its vocab.txt has 47 tokens, and its config.json says 48"),
        (["--max-length", "65"], "out/small/discriminator has 64 positions; take --max-length 64 or less"),
        (["--seeds", "0"], "seeds is 0"),
        (["--submit"], "a submission has all nine tasks"),
        (["--glue-dir", "elsewhere"], "there is no elsewhere/CoLA/train.tsv"),
        (["--seeds", "99999999999"], "seeds is 99999999999; it must be from 1 to 10000"),
        (["--max-grad-norm", "inf"], "max_grad_norm is inf"),
        (spoil("vocab.txt", Path.unlink), "is not a model folder: it has no vocab.txt"),
        (spoil(TOKENIZER, lambda p: p.write_text('{"do_lower_case": "no"}')), "does not do"),
        (spoil(TOKENIZER, lambda p: p.write_text('{"tokenize_chinese_chars": false}')), "does not do"),
        (spoil(TOKENIZER, lambda p: p.write_text("[" * 100_000)), "is damaged; take the model's"),
        (spoil("config.json", lambda p: p.write_text("[" * 100_000)), "config.json is not a JSON object"),
        (lambda: (shutil.rmtree("glue/RTE"), ["--task", "cola", "rte"])[1], "there is no glue/RTE/train.tsv"),
    ],
)  # fmt: skip
def test_bad_input_to_fine_tuning(toy_glue, arguments, message):
    arguments = arguments() if callable(arguments) else arguments
    with pytest.raises(SystemExit, match=message) as stop:
        finetune.main([*toy_glue, "--task", "cola", *arguments])
    assert stop.value.code and "\n" not in str(stop.value)
    assert not Path("out/glue/results.jsonl").exists()


@pytest.mark.parametrize("victim", ["results.jsonl", ".npz.tmp"])
def test_a_full_disk_loses_no_finished_seed(toy_glue, monkeypatch, victim):
    common = [*toy_glue, "--task", "wnli", "--num-train-epochs", "1", "--seeds", "2", "--predict"]
    finetune.main([*common, "--out", "whole"])
    fsync, calls = os.fsync, itertools.count()

    def full(number):
        path = Path(os.readlink(f"/proc/self/fd/{number}"))
        if path.name.endswith(victim) and next(calls):
            os.truncate(path, path.stat().st_size - 9)  # the end did not fit
            raise OSError(28, "No space left on device")
        fsync(number)

    monkeypatch.setattr(os, "fsync", full)
    name = victim.removesuffix(".tmp")
    with pytest.raises(SystemExit, match=f"{name}: No space left on device; mend that and go on"):
        finetune.main(common)
    assert not list(Path("out").rglob("*.tmp"))
    monkeypatch.setattr(os, "fsync", fsync)
    finetune.main(common)
    whole, results = read_results("whole"), read_results()
    assert results.keys() == whole.keys()
    assert all(without_times(results[key]) == without_times(whole[key]) for key in whole)


# ------------------------------------------------------------------------------------------------------------
# The official step: three optimizer steps of google-research/electra, recorded in official/


def official_names(name):
    """Names in the official graph: HuggingFace's, but for these. A fused matrix has three."""
    network, name = name.split(".", 1)
    for full in model.huggingface_names(name):
        if network == "generator" and not full.startswith("electra.embeddings."):
            full = full.replace("electra.", "generator.")
        full = full.replace("generator_lm_head.bias", "generator_predictions.output_bias")
        full = full.replace("dense_prediction.", "dense_1.").replace(".layer.", ".layer_")
        full = full.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        full = re.sub(r"_embeddings\.weight$", "_embeddings", full)
        yield re.sub(r"\.weight$", ".kernel", full).replace(".", "/")


def official_tensor(record, prefix, name):
    """A recorded tensor in our layout: kernels are (in, out) there and (out, in) here."""
    parts = [(full, torch.from_numpy(record[f"{prefix}|{full}"])) for full in official_names(name)]
    return torch.cat([part.T if full.endswith("kernel") else part for full, part in parts])


def test_official_step_is_reproduced(monkeypatch):
    """Given the official weights and draws, three steps give the official losses, gradients and weights."""
    facts = json.loads((HERE / "official" / "official_step.json").read_text())
    record = np.load(HERE / "official" / "official_step.npz")
    names = [field.name for field in fields(ElectraConfig) if field.name in facts]
    electra = Electra(ElectraConfig(**{name: facts[name] for name in names}))
    recipe = {field.name: facts[field.name] for field in fields(train.TrainConfig) if field.name in facts}
    recipe = train.TrainConfig(**recipe)
    with torch.no_grad():
        for name, parameter in electra.named_parameters():
            parameter.copy_(official_tensor(record, "before", name))
    optimizer = train.build_optimizer(electra.named_parameters(), recipe)
    input_ids = torch.from_numpy(record["input_ids"]).long()
    for step in range(facts["optimizer_steps"]):

        def recorded(key, step=step):
            return torch.from_numpy(record[f"{step}|{key}"])

        positions, corrupted = recorded("positions").long(), recorded("corrupted_ids").long()
        draws = positions, recorded("weights"), recorded("masked_ids").long()
        monkeypatch.setattr(model, "mask", lambda *args, draws=draws: draws)
        sampled = corrupted.gather(1, positions)
        monkeypatch.setattr(model, "sample", lambda *args, sampled=sampled: sampled)
        output = run_electra(electra, input_ids)
        assert torch.equal(output.corrupted_ids, corrupted)
        assert torch.equal(output.is_replaced.int(), recorded("is_replaced"))
        assert output.mlm_loss.item() == pytest.approx(record[f"{step}|mlm_loss"], rel=1e-6)
        assert output.disc_loss.item() == pytest.approx(record[f"{step}|disc_loss"], rel=1e-6)
        output.loss.backward()
        if step == 0:
            for name, parameter in electra.named_parameters():
                expected = official_tensor(record, "gradient", name)
                assert (parameter.grad - expected).abs().max() <= 1e-5 * expected.abs().max() + 1e-8, name
        lr = train.learning_rate(
            facts["first_step"] + step, recipe.learning_rate, recipe.num_train_steps, recipe.num_warmup_steps
        )
        assert lr == pytest.approx(facts["learning_rates"][step], rel=1e-12)
        train.update(optimizer, lr, recipe.max_grad_norm)
    for name, parameter in electra.named_parameters():
        assert (parameter - official_tensor(record, "after", name)).abs().max() <= 1e-6, name


# ------------------------------------------------------------------------------------------------------------
# The house

FILES = ["model.py", "data.py", "train.py", "glue.py", "finetune.py"]


def test_imports_only_go_up_the_list_and_five_packages_are_enough():
    may_import = {"model": set(), "data": set(), "train": {"model", "data"}, "glue": {"data"}}
    may_import["finetune"] = {"model", "data", "train", "glue"}
    for name in FILES:
        tree = ast.parse((HERE / name).read_text(encoding="utf-8"))
        imported = {
            alias.name.split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        imported |= {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        packages = {"torch", "numpy", "tokenizers", "requests", "tqdm"}
        of_requests = {"urllib3"}  # which requests stands on, and whose Retry it takes
        assert imported - set(sys.stdlib_module_names) - packages - of_requests == may_import[Path(name).stem]
    pins = (HERE / "requirements.txt").read_text().split()
    assert {pin.split("==")[0] for pin in pins} == packages and all("==" in pin for pin in pins)


def test_details_in_code_in_the_readme_and_in_tests_are_the_same():
    in_code = {
        tag for name in FILES for tag in re.findall(r"\[(D\d\d)\]", (HERE / name).read_text(encoding="utf-8"))
    }
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    in_readme = re.findall(r"^\| (D\d\d) \|.*github\.com/google-research/electra/blob/8a46635", readme, re.M)
    tests = {name for name in globals() if name.startswith("test_D")}
    in_tests = {name[5:8] for name in tests}
    assert in_code == set(in_readme) == in_tests and len(in_readme) == len(set(in_readme))
    rows = re.findall(r"^\| (D\d\d) \|(.*)", readme, re.M)
    assert {(tag, name) for tag, row in rows for name in re.findall(r"test_D\w+", row)} == {
        (name[5:8], name) for name in tests
    }


@pytest.mark.parametrize("module", [data, train, finetune])
def test_the_flags_that_the_readme_names_exist(module, capsys):
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    with pytest.raises(SystemExit):
        module.main(["--help"])
    flags = set(re.findall(r"--[a-z0-9][a-z0-9-]*", capsys.readouterr().out))
    commands = re.findall(rf"^ {{4}}.*python {module.__name__}\.py.*", readme, re.M)
    named = {flag for command in commands for flag in re.findall(r"--[a-z0-9-]+", command)}
    assert commands and named <= flags


def test_help_says_every_field_with_its_comment_and_defaults(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "peak learning rate (0.0005; tiny: 0.001; base: 0.0002; large: 0.0002)" in text
    derived = {"vocab_size", "type_vocab_size", "cls_token_id", "sep_token_id", "mask_token_id"}
    for config in (train.TrainConfig, DataConfig, ElectraConfig):
        for field in fields(config):
            assert (f"--{field.name.replace('_', '-')} " in text) == (field.name not in derived)
    with pytest.raises(SystemExit):
        finetune.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(f"--{field.name.replace('_', '-')} " in text for field in fields(finetune.FinetuneConfig))
    assert "not on LayerNorms and biases (0.0)" in text
