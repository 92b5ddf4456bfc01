"""ELECTRA (Clark et al., ICLR 2020, arXiv 2003.10555): two transformers and the loss that trains them
together.

What enters: token ids, (B, L), zero-padded, as data.py writes them. What leaves: the loss, with what the log
and the reader want to see of it, and the two networks as HuggingFace folders. Read from `Electra` downwards:
mask, generator, sample, corrupt, discriminator, loss. [Dnn] marks a detail that the README's table links to
the official code and to its test.

Claim: the logits of both networks agree with those of `transformers` to 1e-5 (test_huggingface_*), and small,
base and large have the official 14,196,219, 119,386,427 and 354,655,291 parameters (test_parameter_counts).

  B  batch: rows of text                 K  slots for masked positions, the same number in every row
  L  length: positions in a row          V  vocabulary size
  E  embedding size                      H  hidden size, of the one network or the other
"""

import json
import math
import pickle
import re
import struct
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class TransformerConfig:
    """The shape of one network: the fields of its config.json, under HuggingFace's names."""

    vocab_size: int = 30522
    embedding_size: int = 128  # width of the embeddings, which both networks share
    hidden_size: int = 256  # width of the discriminator
    num_hidden_layers: int = 12  # layers, of the generator too
    num_attention_heads: int = 4  # attention heads of the discriminator
    intermediate_size: int = 1024  # width of the discriminator's feed-forward layers
    max_position_embeddings: int = 512  # position rows: the longest input there can ever be
    type_vocab_size: int = 2
    hidden_dropout_prob: float = 0.1  # dropout after the embeddings and in every layer
    attention_probs_dropout_prob: float = 0.1  # dropout on the attention probabilities
    layer_norm_eps: float = 1e-12  # epsilon of every LayerNorm
    initializer_range: float = 0.02  # standard deviation of the initial weights, before truncation

    def __post_init__(self):
        check_ranges(self, hidden_dropout_prob=(0, 0.99), attention_probs_dropout_prob=(0, 0.99),
                     layer_norm_eps=(1e-20, 1), initializer_range=(1e-6, 10))
        if self.hidden_size % self.num_attention_heads:
            sys.exit(f"hidden_size {self.hidden_size} cannot be shared by {self.num_attention_heads} heads")


def check_ranges(config, **ranges):
    """Refuse fields out of their (low, high), and whole numbers under 1 where none is given."""
    counts = {field.name: (1, math.inf) for field in fields(config) if field.type is int}
    for name, (low, high) in (counts | ranges).items():
        if not low <= getattr(config, name) <= high:
            sys.exit(f"{name} is {getattr(config, name)}; it must be from {low} to {high}")


@dataclass(frozen=True)
class ElectraConfig(TransformerConfig):
    """The discriminator's shape, what makes the generator's of it, and the objective."""

    generator_size: float = 0.25  # width of the generator as a share of the discriminator's
    mask_prob: float = 0.15  # share of the tokens that the generator has to predict
    discriminator_weight: float = 50.0  # weight of the discriminator's loss; the generator's has weight 1
    cls_token_id: int = 101
    sep_token_id: int = 102
    mask_token_id: int = 103

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, generator_size=(0.001, 10), mask_prob=(0.001, 1), discriminator_weight=(0, 1e6))

    def discriminator(self):
        return TransformerConfig(**{f.name: getattr(self, f.name) for f in fields(TransformerConfig)})

    def generator(self):
        hidden = max(1, round(self.hidden_size * self.generator_size))  # [D18] narrower, not shallower
        heads = max(1, hidden // 64)
        while hidden % heads:  # only for widths that the official code cannot take
            heads -= 1
        shape = dict(hidden_size=hidden, intermediate_size=4 * hidden, num_attention_heads=heads)
        return TransformerConfig(**asdict(self.discriminator()) | shape)

    def num_slots(self, length):
        """K, the most positions that can be predicted in a row of `length`; 19 for small's 128."""
        return min(length, max(1, int((self.mask_prob + 0.005) * length)))


# Only what differs from ElectraConfig's defaults, which are small's.
SIZES = {
    # Narrow layers need larger initial weights, or else next to nothing of the context reaches a token.
    "tiny": dict(embedding_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
                 intermediate_size=256, max_position_embeddings=32, hidden_dropout_prob=0.0,
                 attention_probs_dropout_prob=0.0, initializer_range=0.1, generator_size=0.5),
    "small": dict(),
    "base": dict(embedding_size=768, hidden_size=768, num_attention_heads=12, intermediate_size=3072,
                 generator_size=1 / 3),
    "large": dict(embedding_size=1024, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
                  intermediate_size=4096, mask_prob=0.25),
}


# ------------------------------------------------------------------------------------------------------------
# The objective


class Output(NamedTuple):
    """What one forward pass leaves.

    The losses are this part's sums over the whole batch's counts, so that the parts of a batch add up to it.
    """

    loss: torch.Tensor  # () what is trained on
    mlm_loss: torch.Tensor  # () the generator's part of it
    disc_loss: torch.Tensor  # () the discriminator's, not yet weighted
    mlm_correct: torch.Tensor  # () predictions whose likeliest token is the original
    sampled_correct: torch.Tensor  # () predictions whose sampled token is the original
    positions: torch.Tensor  # (B, K) where the text was masked; 0 in unused slots
    weights: torch.Tensor  # (B, K) 1 for a prediction, 0 for an unused slot
    corrupted_ids: torch.Tensor  # (B, L) what the discriminator read
    is_replaced: torch.Tensor  # (B, L) bool, what it should have said
    disc_logits: torch.Tensor  # (B, L) what it said: above 0 for "replaced"


class Electra(nn.Module):
    """Generator, discriminator and the objective that trains them together: replaced-token detection."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        embeddings = Embeddings(config)  # [D16] one object for both networks, its LayerNorm included
        self.generator = Generator(config.generator(), embeddings)
        self.discriminator = Discriminator(config.discriminator(), embeddings)

    def counts(self, input_ids):
        """How many predictions and how many tokens a batch has, (2,): what its two sums of losses are divided
        by.

        They follow from the ids alone, so a micro-batch can divide by the counts of the batch it is a part
        of.
        """
        predictions = num_predictions(input_ids, selectable(input_ids, self.config), self.config)
        return torch.stack([predictions.sum(), (input_ids != 0).sum()]).float()

    def forward(self, input_ids, mask_uniform, sample_uniform, counts):
        """One pass of the objective over a batch or a part of one.

        input_ids (B, L) int64; mask_uniform (B, L) float64 and sample_uniform (B, K) float32 are uniform in
        [0, 1) and, but for dropout, all the randomness of a step; counts (2,) are `self.counts` of the whole
        batch.
        """
        attention_mask, token_type_ids = attention_mask_and_token_types(input_ids, self.config.sep_token_id)
        n_predictions, n_tokens = counts + 1e-6

        # [D10] The mask is drawn anew at every step.
        positions, weights, masked_ids = mask(input_ids, mask_uniform, self.config)  # (B, K), (B, K), (B, L)
        labels = input_ids.gather(1, positions)  # (B, K)

        # One pass of the generator, with dropout, serves both its loss and the samples.
        mlm_logits = widen(self.generator(masked_ids, attention_mask, token_type_ids, positions))  # (B, K, V)
        mlm_losses = F.cross_entropy(mlm_logits.flatten(0, 1), labels.flatten(), reduction="none")  # (B K)

        sampled = sample(mlm_logits.detach(), sample_uniform)  # (B, K) [D11] no argmax, and no gradient
        corrupted_ids = corrupt(input_ids, positions, weights, sampled)  # (B, L)
        is_replaced = corrupted_ids != input_ids  # [D13] a sample that hits the original is original

        # Mask and token types are still those of the original: the generator may sample [PAD] or [SEP].
        disc_logits = widen(self.discriminator(corrupted_ids, attention_mask, token_type_ids))  # (B, L)
        targets = is_replaced.to(disc_logits.dtype)
        disc_losses = F.binary_cross_entropy_with_logits(disc_logits, targets, reduction="none")  # (B, L)

        mlm_loss = (mlm_losses.view_as(labels) * weights).sum() / n_predictions
        disc_loss = (disc_losses * attention_mask).sum() / n_tokens  # [D14] every token, [CLS] and [SEP] too
        return Output(
            loss=mlm_loss + self.config.discriminator_weight * disc_loss,  # [D15]
            mlm_loss=mlm_loss.detach(),
            disc_loss=disc_loss.detach(),
            mlm_correct=((mlm_logits.argmax(-1) == labels) * weights).sum(),
            sampled_correct=((sampled == labels) * weights).sum(),
            positions=positions,
            weights=weights,
            corrupted_ids=corrupted_ids,
            is_replaced=is_replaced,
            disc_logits=disc_logits.detach(),
        )


def attention_mask_and_token_types(input_ids, sep_token_id):
    """Both follow from the ids: (B, L) bool, True on tokens, and (B, L) int64. [D35]

    [CLS] a [SEP] b [SEP] [PAD] has types 0 0 0 1 1 0: 1 after the first [SEP], and 0 again on padding.
    """
    attention_mask = input_ids != 0
    is_sep = (input_ids == sep_token_id).long()
    is_after_sep = is_sep.cumsum(1) > is_sep  # of the [SEP]s up to here, not only the one that is here
    return attention_mask, (is_after_sep & attention_mask).long()


def selectable(input_ids, config):
    """The tokens that may be masked, (B, L) bool."""
    never = (0, config.cls_token_id, config.sep_token_id, config.mask_token_id)
    return torch.stack([input_ids != token for token in never]).all(0)  # [D07]


def num_predictions(input_ids, candidates, config):
    """How many positions of each row are predicted, (B,) int64."""
    lengths = (input_ids != 0).sum(1)
    wanted = torch.round(lengths.float() * config.mask_prob).long()  # [D08] half to even
    return torch.minimum(wanted.clamp(1, config.num_slots(input_ids.shape[1])), candidates.sum(1))


def mask(input_ids, uniform, config):
    """Choose what is predicted: positions (B, K), weights (B, K), 1 or 0, and the masked ids (B, L).

    The one number of a position decides all: its upper bits are the position's rank, its lower bits the toss
    between [MASK] and staying visible. float64 has 53 bits, enough for two numbers.
    """
    candidates, num_slots = selectable(input_ids, config), config.num_slots(input_ids.shape[1])
    # [D09] Unlike the official code without replacement: the candidates of the highest ranks, once each.
    positions = uniform.masked_fill(~candidates, -1.0).topk(num_slots).indices  # (B, K)
    slots = torch.arange(num_slots, device=input_ids.device)
    used = slots < num_predictions(input_ids, candidates, config)[:, None]  # (B, K)
    positions = positions * used  # an unused slot points at [CLS]

    original = input_ids.gather(1, positions)  # (B, K)
    toss = (uniform.gather(1, positions) * 2**24).frac()
    shown = torch.where(used & (toss < 0.85), config.mask_token_id, original)  # [D06]
    return positions, used.float(), input_ids.scatter(1, positions, shown)  # unused slots put [CLS] on [CLS]


@torch.no_grad()
def sample(logits, uniform):
    """Draw tokens from the softmax of logits (B, K, V), one for each number of uniform (B, K): (B, K) int64.

    Unlike the official code, which adds noise to all B x K x V logits, by inverse CDF: the token drawn is the
    first whose cumulated probability exceeds the number.
    """
    cumulated = logits.softmax(-1).cumsum(-1)  # (B, K, V)
    thresholds = uniform[..., None] * cumulated[..., -1:]  # the last is 1 but for rounding
    sampled = torch.searchsorted(cumulated, thresholds.to(cumulated), right=True).squeeze(-1)
    return sampled.clamp(max=logits.shape[-1] - 1)  # what is not a number goes beyond the last


def corrupt(input_ids, positions, weights, sampled):
    """The original text, not the masked one, with every predicted token resampled, (B, L). [D12]"""
    original = input_ids.gather(1, positions)
    return input_ids.scatter(1, positions, torch.where(weights > 0, sampled, original))


def widen(logits):
    """bf16 is too coarse for a softmax over a vocabulary and for a loss."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


# ------------------------------------------------------------------------------------------------------------
# The two networks


class Generator(nn.Module):
    """A small masked language model."""

    def __init__(self, config, embeddings=None):
        super().__init__()
        self.encoder = Encoder(config, embeddings)
        self.generator_predictions = nn.ModuleDict(dict(
            dense=nn.Linear(config.hidden_size, config.embedding_size),
            LayerNorm=nn.LayerNorm(config.embedding_size, eps=config.layer_norm_eps),
        ))
        self.generator_lm_head = nn.ParameterDict(dict(bias=torch.zeros(config.vocab_size)))
        truncated_normal_(self.generator_predictions["dense"], config)

    def forward(self, input_ids, attention_mask, token_type_ids, positions):
        """Logits over the vocabulary at `positions` (B, K) and nowhere else, (B, K, V). [D19]"""
        hidden = self.encoder(input_ids, attention_mask, token_type_ids)  # (B, L, H)
        hidden = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))  # (B, K, H)
        hidden = F.gelu(self.generator_predictions["dense"](hidden))  # (B, K, E)
        hidden = self.generator_predictions["LayerNorm"](hidden)
        table = self.encoder.embeddings.word_embeddings.weight  # (V, E), both input and output layer
        return F.linear(hidden, table, self.generator_lm_head["bias"])


class Discriminator(nn.Module):
    """Tells for every token whether it was replaced."""

    def __init__(self, config, embeddings=None):
        super().__init__()
        self.encoder = Encoder(config, embeddings)
        self.discriminator_predictions = nn.ModuleDict(dict(
            dense=nn.Linear(config.hidden_size, config.hidden_size),
            dense_prediction=nn.Linear(config.hidden_size, 1),
        ))
        truncated_normal_(self.discriminator_predictions["dense"], config)
        glorot_uniform_(self.discriminator_predictions["dense_prediction"])

    def forward(self, input_ids, attention_mask, token_type_ids):
        """Logits (B, L), above 0 for "replaced". [D20]"""
        hidden = self.encoder(input_ids, attention_mask, token_type_ids)  # (B, L, H)
        hidden = F.gelu(self.discriminator_predictions["dense"](hidden))
        return self.discriminator_predictions["dense_prediction"](hidden).squeeze(-1)


class Encoder(nn.Module):
    """Embeddings and transformer layers."""

    def __init__(self, config, embeddings=None):
        super().__init__()
        self.embeddings = Embeddings(config) if embeddings is None else embeddings
        self.embeddings_project = None
        if config.embedding_size != config.hidden_size:
            self.embeddings_project = nn.Linear(config.embedding_size, config.hidden_size)  # [D17]
            glorot_uniform_(self.embeddings_project)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, input_ids, attention_mask, token_type_ids):
        """(B, L) ids, mask and token types -> (B, L, H). For a whole row stands [:, 0], as it is. [D23]"""
        hidden = self.embeddings(input_ids, token_type_ids)  # (B, L, E)
        if self.embeddings_project is not None:
            hidden = self.embeddings_project(hidden)  # (B, L, H)
        for layer in self.layers:
            hidden = layer(hidden, attention_mask[:, None, None, :])
        return hidden


class Embeddings(nn.Module):
    """Word, position and token-type embeddings and their LayerNorm: what the two networks share."""

    def __init__(self, config):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.embedding_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.embedding_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.embedding_size)
        self.LayerNorm = nn.LayerNorm(config.embedding_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        for table in (self.word_embeddings, self.position_embeddings, self.token_type_embeddings):
            truncated_normal_(table, config)  # [PAD]'s row like any other

    def forward(self, input_ids, token_type_ids):
        hidden = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)  # (B, L, E)
        hidden = hidden + self.position_embeddings.weight[: input_ids.shape[1]]
        return self.dropout(self.LayerNorm(hidden))


class Layer(nn.Module):
    """A post-LN transformer layer: attention, then feed-forward, each with dropout, add, LayerNorm. [D22]"""

    def __init__(self, config):
        super().__init__()
        H, self.num_heads = config.hidden_size, config.num_attention_heads
        self.query_key_value = nn.Linear(H, 3 * H)  # three matrices in one product
        self.attention_output = nn.Linear(H, H)
        self.attention_norm = nn.LayerNorm(H, eps=config.layer_norm_eps)
        self.intermediate = nn.Linear(H, config.intermediate_size)
        self.output = nn.Linear(config.intermediate_size, H)
        self.output_norm = nn.LayerNorm(H, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.attention_dropout_prob = config.attention_probs_dropout_prob
        for linear in (self.query_key_value, self.attention_output, self.intermediate, self.output):
            truncated_normal_(linear, config)

    def forward(self, hidden, keys):
        """`keys` (B, 1, 1, L) says which positions can be attended to; padding itself still attends."""
        B, L, H = hidden.shape
        query, key, value = (
            part.view(B, L, self.num_heads, H // self.num_heads).transpose(1, 2)  # (B, heads, L, H / heads)
            for part in self.query_key_value(hidden).chunk(3, dim=-1)
        )
        dropout_prob = self.attention_dropout_prob if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=keys, dropout_p=dropout_prob)
        attended = self.attention_output(attended.transpose(1, 2).reshape(B, L, H))
        hidden = self.attention_norm(hidden + self.dropout(attended))
        fed_forward = self.output(F.gelu(self.intermediate(hidden)))
        return self.output_norm(hidden + self.dropout(fed_forward))


def truncated_normal_(module, config):
    """[D21] 0.02 is the deviation before truncation at two deviations; 0.0176 is left of it."""
    std = config.initializer_range
    nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


def glorot_uniform_(linear):
    """TensorFlow's default, where the official code names no initialiser."""
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)


# ------------------------------------------------------------------------------------------------------------
# Weights in and out, as HuggingFace folders

LAYER_NAMES = {  # a module of Layer -> its HuggingFace names, in the order in which their rows are stacked
    "query_key_value": ["attention.self.query", "attention.self.key", "attention.self.value"],
    "attention_output": ["attention.output.dense"],
    "attention_norm": ["attention.output.LayerNorm"],
    "intermediate": ["intermediate.dense"],
    "output": ["output.dense"],
    "output_norm": ["output.LayerNorm"],
}
HEADS = ("discriminator_predictions.", "generator_predictions.", "generator_lm_head.")
ARCHITECTURES = {Discriminator: "ElectraForPreTraining", Generator: "ElectraForMaskedLM"}


def huggingface_names(name):
    """encoder.layers.0.output.bias -> [electra.encoder.layer.0.output.dense.bias]; a fused tensor has three
    names."""
    if match := re.fullmatch(r"encoder\.layers\.(\d+)\.(\w+)\.(\w+)", name):
        layer, module, kind = match.groups()
        return [f"electra.encoder.layer.{layer}.{full}.{kind}" for full in LAYER_NAMES[module]]
    return [re.sub(r"^encoder\.", "electra.", name)]


def save_pretrained(network, config, folder, vocab, do_lower_case, strip_accents):
    """Write a Generator or a Discriminator as a folder that `transformers` loads, over what is there.

    `vocab` is the list of tokens in the order of their ids.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)

    def write_json(name, content):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    write_json("config.json", asdict(config) | {
        "model_type": "electra", "architectures": [ARCHITECTURES[type(network)]], "hidden_act": "gelu",
        "pad_token_id": 0, "tie_word_embeddings": True,
    })
    # Without this file transformers lower-cases and strips accents whatever the vocabulary.
    write_json("tokenizer_config.json", {
        "tokenizer_class": "ElectraTokenizer", "do_lower_case": do_lower_case,
        "strip_accents": strip_accents, "tokenize_chinese_chars": True,
        "model_max_length": config.max_position_embeddings,
    })
    (folder / "vocab.txt").write_bytes("".join(token + "\n" for token in vocab).encode())
    tensors = {}
    for name, tensor in network.state_dict().items():
        names = huggingface_names(name)
        tensors.update(zip(names, tensor.float().cpu().chunk(len(names)), strict=True))
    write_safetensors(folder / "model.safetensors", tensors)


def load_config(folder):
    """The TransformerConfig of a HuggingFace ELECTRA folder. Fields that it does not know are not read."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        sys.exit(f"{folder} is not a model folder: it has no config.json")
    try:
        shape = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        sys.exit(f"{path} is not a JSON object ({error})")
    only = {"model_type": "electra", "hidden_act": "gelu", "position_embedding_type": "absolute"}
    for key, ours in only.items():
        if shape.get(key, ours) != ours:
            sys.exit(f"{path} says {key} = {shape[key]!r}; only {ours!r} can be read")
    known = [field for field in fields(TransformerConfig) if field.name in shape]
    for field in known:
        if type(shape[field.name]) not in (field.type, int):
            sys.exit(f"{path} says {field.name} = {shape[field.name]!r}, not a {field.type.__name__}")
    return TransformerConfig(**{field.name: shape[field.name] for field in known})


def load_weights(network, folder, encoder_only=False):
    """Fill a Generator, a Discriminator or, with encoder_only, anything with an `.encoder`, from a folder.

    Every tensor must be there with its shape and none may be left over, except `position_ids`, the tied
    generator_lm_head.weight, and, with encoder_only, the pre-training heads. Returns the path of the weights.
    """
    tensors, path = read_weights(folder)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".position_ids")}
    table = tensors.get("electra.embeddings.word_embeddings.weight")
    tied = tensors.pop("generator_lm_head.weight", table)
    if table is not None and not torch.equal(tied, table):
        sys.exit(f"{path}: generator_lm_head.weight is not tied to the word embeddings, as it should be")
    ours = network.state_dict()
    if encoder_only:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(HEADS)}
        ours = {name: tensor for name, tensor in ours.items() if name.startswith("encoder.")}

    expected = {}
    for name, tensor in ours.items():
        parts = huggingface_names(name)
        expected |= dict.fromkeys(parts, [tensor.shape[0] // len(parts), *tensor.shape[1:]])
    wrong = [f"{name} is left over" for name in tensors.keys() - expected.keys()]
    for name, shape in expected.items():
        if name not in tensors:
            wrong.append(f"{name} is missing")
        elif list(tensors[name].shape) != shape:
            wrong.append(f"{name} has shape {list(tensors[name].shape)} instead of {shape}")
    if wrong:
        sys.exit(f"{path} does not hold this {type(network).__name__}: {'; '.join(sorted(wrong))}")
    state = {name: torch.cat([tensors[part] for part in huggingface_names(name)]) for name in ours}
    network.load_state_dict(state, strict=not encoder_only)
    return path


def read_weights(folder):
    """The tensors of a HuggingFace folder by name, as fp32 on the CPU, and the path of their file."""
    path = Path(folder) / "model.safetensors"
    if path.is_file():
        return read_safetensors(path), path
    path = Path(folder) / "pytorch_model.bin"
    if not path.is_file():
        sys.exit(f"{folder} is not a model folder: it has neither model.safetensors nor pytorch_model.bin")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, LookupError, AttributeError, ValueError,
            TypeError, AssertionError, struct.error) as error:
        sys.exit(f"{path} is not a file of weights, or it is damaged ({type(error).__name__} in reading it)")
    tables = isinstance(tensors, dict) and all(isinstance(name, str) for name in tensors)
    if not tables or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        sys.exit(f"{path} is not a table of weights by name")
    return {name: tensor.float() for name, tensor in tensors.items()}, path


# The format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, raw
# tensors.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32}


def write_safetensors(path, tensors):
    """Write fp32 tensors by name."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        start, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the data begins at a multiple of eight
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor.numpy(), dtype="<f4").tobytes())


def read_safetensors(path):
    """Read tensors by name, as fp32. Nothing that the header says is trusted before it is checked."""
    data = np.fromfile(path, dtype=np.uint8)
    try:
        length = int(data[:8].view("<u8")[0])
        if length > data.size - 8:
            raise ValueError("its header is longer than the file")
        header = json.loads(data[8 : 8 + length].tobytes())
        body, tensors, end = data[8 + length :], {}, 0
        for name, entry in sorted(header.items(), key=lambda item: item[1].get("data_offsets", [0])):
            if name == "__metadata__":
                continue
            dtype, shape, (start, stop) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            if start != end or stop - start != math.prod(shape) * dtype.itemsize or stop > body.size:
                raise ValueError(f"offsets and shape of {name} disagree")
            end = stop
            raw = torch.from_numpy(body[start:stop].copy())
            tensors[name] = raw.view(dtype).view(shape).float()
        if end != body.size:
            raise ValueError("it is longer than its header says")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        sys.exit(f"{path} is not a safetensors file that can be read, or it is damaged ({error})")
    return tensors
