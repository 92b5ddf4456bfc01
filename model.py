"""ELECTRA (Clark et al., ICLR 2020, arXiv 2003.10555): two transformers and the loss that trains them.

The generator, a small masked language model, fills in masked tokens. The discriminator says for every token
of the result whether it was replaced. Read from `Electra.forward` downwards: mask, generator, sample,
corrupt, discriminator, loss. The end of the file reads and writes HuggingFace folders. [Dnn] marks a detail
that DETAILS.md explains and links to the official code and to its test. LOG.md has the measurements.

This is not a GAN. The generator is trained to predict the original tokens, not to fool the discriminator:
no gradient passes a sampled token, and the paper found reinforcement learning to work worse. The generator
is the smaller network, since the fakes of a large one are too hard for the discriminator to learn from. Both
networks share their embeddings, because the generator's softmax over the whole vocabulary trains them best.
After training only the discriminator is kept. Fine-tuning adds a layer on its [CLS] vector and trains the
whole network.

    electra = Electra(ElectraConfig())
    output = electra(torch.tensor([[101, 1996, 4937, 2938, 102]]))  # [CLS] the cat sat [SEP]
    output.loss.backward()

  B  batch: rows of text                 K  slots for masked positions, the same number in every row
  L  length: positions in a row          V  vocabulary size
  E  embedding size                      H  hidden size of the network in question
"""

import hashlib
import json
import math
import pickle
import struct
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import nn


class ModelError(ValueError):
    """A mistake in a shape or in a model folder. The message is a sentence that says what to correct."""


@dataclass(frozen=True)
class ElectraConfig:
    """The shape of a network, under HuggingFace's names, and the objective. The defaults are those of small.

    The shape is the discriminator's; `generator_config` derives the generator's. A field's annotation has its
    type, its help, and the least and the greatest value. train.py makes a flag of each field with a help.
    """

    vocab_size: Annotated[int, "", 1, 65_535] = 30522  # data.py stores ids in 16 bits
    embedding_size: Annotated[int, "width of the embeddings, which both networks share", 1, 65_536] = 128
    hidden_size: Annotated[int, "width of the discriminator", 1, 65_536] = 256
    num_hidden_layers: Annotated[int, "layers of either network", 1, 1000] = 12
    num_attention_heads: Annotated[int, "attention heads of the discriminator", 1, 1000] = 4
    intermediate_size: Annotated[int, "width of the discriminator's feed-forward layers", 1, 1_000_000] = 1024
    max_position_embeddings: Annotated[int, "longest possible input", 8, 1_000_000] = 512
    type_vocab_size: Annotated[int, "", 2, 1000] = 2
    hidden_dropout_prob: Annotated[float, "dropout after the embeddings and in every layer", 0, 0.9] = 0.1
    attention_probs_dropout_prob: Annotated[float, "dropout on the attention probabilities", 0, 0.9] = 0.1
    layer_norm_eps: Annotated[float, "epsilon of every LayerNorm", 0, 0.1] = 1e-12
    initializer_range: Annotated[float, "standard deviation of the initial weights, before truncation",
                                 1e-6, 1] = 0.02
    generator_size: Annotated[float, "width of the generator as a share of the discriminator's", 0, 4] = 0.25
    mask_prob: Annotated[float, "share of the tokens that the generator predicts", 0.01, 1] = 0.15
    discriminator_weight: Annotated[float, "weight of the discriminator's loss; the MLM loss, much "
                                           "larger, has 1", 0, 1e6] = 50.0
    objective: Annotated[str, "electra, or mlm: only a generator, as wide as the discriminator "
                              "would be"] = "electra"
    cls_token_id: Annotated[int, "", 1, 65_534] = 101
    sep_token_id: Annotated[int, "", 1, 65_534] = 102
    mask_token_id: Annotated[int, "", 1, 65_534] = 103

    def __post_init__(self):
        check_ranges(self)
        if self.hidden_size % self.num_attention_heads:
            raise ModelError(f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                             f"{self.num_attention_heads}")
        if self.objective not in ("electra", "mlm"):
            raise ModelError(f"there is no objective {self.objective}; there are electra and mlm")

    def with_vocabulary(self, wordpiece):
        """This config with the size and the special tokens of a data.WordPiece."""
        return replace(self, vocab_size=len(wordpiece.tokens), cls_token_id=wordpiece.cls_token_id,
                       sep_token_id=wordpiece.sep_token_id, mask_token_id=wordpiece.mask_token_id)

    def generator_config(self):
        """The shape of the generator."""
        if self.objective == "mlm":
            return self
        hidden = max(1, round(self.hidden_size * self.generator_size))  # [D18] narrower, not shallower
        heads = max(1, hidden // 64)
        while hidden % heads:  # not all widths are multiples of 64
            heads -= 1
        return replace(self, hidden_size=hidden, intermediate_size=4 * hidden, num_attention_heads=heads)

    def num_slots(self, length):
        """K, the slots for predictions in a row of `length`: 19 for small's 128. [D08]

        A tensor needs one K for all rows. A row with padding has fewer predictions, and its last slots are
        spare: they are ignored.
        """
        slots = int((self.mask_prob + 0.005) * length)  # 0.005 as in the official code
        return min(length, max(1, slots))


def check_ranges(config):
    """Check that the numbers of a config are in the ranges that annotate their fields."""
    for field in fields(config):
        annotation = get_args(field.type)
        if len(annotation) < 4:  # not a field of numbers
            continue
        kind, _, least, most = annotation
        value = getattr(config, field.name)
        is_number = isinstance(value, int | kind) and not isinstance(value, bool)  # True is an int for Python
        if not is_number or not least <= value <= most:  # NaN is in no range
            raise ModelError(f"{field.name} is {value}; it must be between {least} and {most} "
                             f"({kind.__name__})")


# ------------------------------------------------------------------------------------------------------------
# The objective


class Output(NamedTuple):
    """The result of a forward pass.

    A loss is the sum over the predictions, or tokens, of this pass, divided by their number in the whole
    batch. So the losses of micro-batches add up to the loss of the batch.
    """

    loss: torch.Tensor  # () to call backward() on
    mlm_loss: torch.Tensor  # () the generator's part of it
    mlm_correct: torch.Tensor  # () the number of predictions whose most likely token is the original
    sampled_correct: torch.Tensor  # () the number of predictions whose sampled token is the original
    positions: torch.Tensor  # (B, K) the predicted positions; 0 in spare slots
    is_used: torch.Tensor  # (B, K) bool, False for a spare slot
    corrupted_ids: torch.Tensor  # (B, L) the text with the samples in it
    is_replaced: torch.Tensor  # (B, L) bool, where it differs from the original
    # None without a discriminator:
    disc_loss: torch.Tensor = None  # () the discriminator's part, before its weight
    disc_logits: torch.Tensor = None  # (B, L) above 0 for "replaced"


class Electra(nn.Module):
    """Generator, discriminator, and the objective that trains them together: replaced-token detection."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        embeddings = Embeddings(config)  # [D16] one object in both networks, LayerNorm included
        self.generator = Generator(config.generator_config(), embeddings)
        self.discriminator = Discriminator(config, embeddings) if config.objective == "electra" else None

    def forward(self, input_ids, uniforms=None, counts=None):
        """One pass of the objective over rows of token ids (B, L) that begin with [CLS], zero-padded.

        `uniforms` (B, L + 2K) float32 in [0, 1) is all the randomness apart from dropout. Of each row, L
        numbers choose the positions, K decide between [MASK] and staying visible, and K draw the samples.
        With `uniforms` passed in, a step is a function of (seed, step) on any device. For a micro-batch, pass
        `counts` (2,), the `loss_counts` of the whole batch.
        """
        B, L = input_ids.shape
        K = self.config.num_slots(L)
        if uniforms is None:
            uniforms = torch.rand(B, L + 2 * K, device=input_ids.device)
        if counts is None:
            counts = loss_counts(input_ids, self.config)
        total_predictions, total_tokens = counts  # 1e-6 is added where they divide, as in the official code
        # Computed once, from the original ids: a sampled [PAD] or [SEP] must not change them.
        attention_mask, token_type_ids = attention_mask_and_token_types(input_ids, self.config.sep_token_id)

        # [D10] The mask is drawn anew at every step.
        priorities, mask_uniforms, sample_uniforms = uniforms.split([L, K, K], dim=1)
        positions, is_used, labels, masked_ids = mask_tokens(
            input_ids, priorities, mask_uniforms, self.config)

        # One pass of the generator, with dropout, serves its loss and the samples.
        mlm_logits = self.generator(masked_ids, attention_mask, token_type_ids, positions)  # (B, K, V)
        log_probs = mlm_logits.log_softmax(-1)
        mlm_losses = -log_probs.gather(2, labels[..., None]).squeeze(2)  # (B, K) cross-entropy
        mlm_loss = (mlm_losses * is_used).sum() / (total_predictions + 1e-6)

        sampled = sample(log_probs.detach(), sample_uniforms)  # (B, K) [D11] no argmax, no gradient
        corrupted_ids = corrupt(input_ids, positions, is_used, labels, sampled)  # (B, L)
        is_replaced = corrupted_ids != input_ids  # [D13] a correct guess counts as original

        # The baseline, a masked language model, has no discriminator.
        loss = mlm_loss
        disc_loss = None
        disc_logits = None
        if self.discriminator is not None:
            disc_logits = self.discriminator(corrupted_ids, attention_mask, token_type_ids)  # (B, L)
            targets = is_replaced.to(disc_logits.dtype)
            disc_losses = F.binary_cross_entropy_with_logits(disc_logits, targets, reduction="none")  # (B, L)
            disc_loss = (disc_losses * attention_mask).sum() / (total_tokens + 1e-6)  # [D14] [CLS], [SEP] too
            loss = mlm_loss + self.config.discriminator_weight * disc_loss  # [D15]
            # Only `loss` keeps its graph.
            disc_loss = disc_loss.detach()
            disc_logits = disc_logits.detach()

        return Output(
            loss=loss,
            mlm_loss=mlm_loss.detach(),
            mlm_correct=((mlm_logits.argmax(-1) == labels) & is_used).sum(),
            sampled_correct=((sampled == labels) & is_used).sum(),
            positions=positions,
            is_used=is_used,
            corrupted_ids=corrupted_ids,
            is_replaced=is_replaced,
            disc_loss=disc_loss,
            disc_logits=disc_logits,
        )


def attention_mask_and_token_types(input_ids, sep_token_id):
    """Attention mask (B, L) bool and token types (B, L) int64. Both follow from the ids: [PAD] is 0. [D35]

    Types are 0 up to and including the first [SEP], then 1, and 0 on padding:

    >>> ids = torch.tensor([[101, 7, 102, 8, 102, 0]])
    >>> attention_mask, token_type_ids = attention_mask_and_token_types(ids, sep_token_id=102)
    >>> attention_mask.int().tolist(), token_type_ids.tolist()
    ([[1, 1, 1, 1, 1, 0]], [[0, 0, 0, 1, 1, 0]])
    """
    attention_mask = input_ids != 0
    is_sep = (input_ids == sep_token_id).long()
    seps_before = is_sep.cumsum(1) - is_sep
    token_type_ids = ((seps_before > 0) & attention_mask).long()
    return attention_mask, token_type_ids


def mask_tokens(input_ids, priorities, mask_uniforms, config):
    """Choose what to predict, and mask it: positions, is_used, labels (B, K) and masked ids (B, L).

    A row has K slots, and uses the first `num_predictions` of them. The tokens with the highest of the random
    `priorities` (B, L) are predicted; the labels are these tokens. `mask_uniforms` (B, K) decide between
    [MASK] and staying visible. Here two of five tokens are predicted, and the second stays visible:

    >>> ids = torch.tensor([[101, 5, 6, 7, 102]])
    >>> priorities = torch.tensor([[0.9, 0.1, 0.8, 0.5, 0.9]])
    >>> mask_tokens(ids, priorities, torch.tensor([[0.2, 0.95]]), ElectraConfig(mask_prob=0.4))
    (tensor([[2, 3]]), tensor([[True, True]]), tensor([[6, 7]]), tensor([[101,   5, 103,   7, 102]]))
    """
    K = mask_uniforms.shape[1]
    # [D09] Unlike the official code, positions are drawn without replacement. `topk` sorts by priority, so
    # tokens that must not be predicted come last, beyond `num_predictions`.
    drawn = priorities.masked_fill(~selectable(input_ids, config), -1.0).topk(K).indices  # (B, K)
    slots = torch.arange(K, device=input_ids.device)
    is_used = slots < num_predictions(input_ids, config)[:, None]  # (B, K)
    positions = torch.where(is_used, drawn, 0)  # a spare slot rewrites [CLS] with itself

    labels = input_ids.gather(1, positions)
    becomes_mask = is_used & (mask_uniforms < 0.85)  # [D06] the others stay; unlike in BERT, none is random
    shown = torch.where(becomes_mask, config.mask_token_id, labels)
    masked_ids = input_ids.scatter(1, positions, shown)
    return positions, is_used, labels, masked_ids


def num_predictions(input_ids, config):
    """How many positions of each row are predicted, (B,) int64. [D08]

    `mask_prob` of the row's tokens, at least 1 and at most K, and never more than are selectable.
    """
    K = config.num_slots(input_ids.shape[1])
    lengths = (input_ids != 0).sum(1)
    wanted = torch.round(lengths.float() * config.mask_prob).long().clamp(1, K)  # half rounds to even
    return torch.minimum(wanted, selectable(input_ids, config).sum(1))


def selectable(input_ids, config):
    """The tokens that may be predicted, (B, L) bool: all but [CLS], [SEP], [MASK] and padding. [D07]"""
    is_cls = input_ids == config.cls_token_id
    is_sep = input_ids == config.sep_token_id
    is_mask = input_ids == config.mask_token_id
    is_padding = input_ids == 0
    return ~(is_cls | is_sep | is_mask | is_padding)


def sample(log_probs, uniforms):
    """Draw from log-probabilities (B, K, V), one token for each of uniforms (B, K): (B, K) int64.

    The token drawn is the first whose cumulative probability exceeds the uniform number. (The official code
    adds Gumbel noise to all B x K x V logits instead, and takes the largest. The distribution is the same.)

    >>> sample(torch.tensor([[[0.2, 0.5, 0.3]]]).log(), torch.tensor([[0.6]]))  # 0.2 <= 0.6 < 0.2 + 0.5
    tensor([[1]])
    """
    cumulative = log_probs.exp().cumsum(-1)  # (B, K, V)
    total = cumulative[..., -1:]  # close to 1
    thresholds = uniforms[..., None] * total  # (B, K, 1), none above the last cumulative probability
    sampled = torch.searchsorted(cumulative, thresholds, right=True).squeeze(-1)
    return sampled.clamp(max=log_probs.shape[-1] - 1)  # NaN lands past the end; train.py reports it


def corrupt(input_ids, positions, is_used, labels, sampled):
    """The original text, not the masked one, with a sample in place of each predicted token: (B, L). [D12]

    >>> ids = torch.tensor([[101, 5, 6, 102]])
    >>> positions = torch.tensor([[2, 0]])
    >>> is_used = torch.tensor([[True, False]])  # the second slot is spare
    >>> labels = torch.tensor([[6, 101]])
    >>> corrupt(ids, positions, is_used, labels, sampled=torch.tensor([[9, 8]]))
    tensor([[101,   5,   9, 102]])
    """
    return input_ids.scatter(1, positions, torch.where(is_used, sampled, labels))


def loss_counts(input_ids, config):
    """(Predictions, tokens) of a batch, (2,) float32: what the two losses are divided by.

    They follow from the ids, so a micro-batch can divide by the counts of the batch it belongs to.
    """
    num_predicted = num_predictions(input_ids, config).sum()
    num_tokens = (input_ids != 0).sum()
    return torch.stack([num_predicted, num_tokens]).float()


# ------------------------------------------------------------------------------------------------------------
# The two networks


class Generator(nn.Module):
    """A small masked language model."""

    architecture = "ElectraForMaskedLM"  # its name in transformers

    def __init__(self, config, embeddings=None):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, embeddings)
        self.mlm_dense = nn.Linear(config.hidden_size, config.embedding_size)
        self.mlm_norm = nn.LayerNorm(config.embedding_size, eps=config.layer_norm_eps)
        self.mlm_bias = nn.Parameter(torch.zeros(config.vocab_size))
        init_truncated_normal(self.mlm_dense, config)

    def forward(self, input_ids, attention_mask, token_type_ids, positions):
        """Logits over the vocabulary at `positions` (B, K) only: (B, K, V). [D19]"""
        hidden = self.encoder(input_ids, attention_mask, token_type_ids)  # (B, L, H)
        hidden = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))  # (B, K, H)
        hidden = self.mlm_norm(F.gelu(self.mlm_dense(hidden)))  # (B, K, E)
        word_embeddings = self.encoder.embeddings.word_embeddings.weight  # (V, E), input and output layer
        return in_fp32(F.linear(hidden, word_embeddings, self.mlm_bias))


class Discriminator(nn.Module):
    """Says for every token whether it was replaced."""

    architecture = "ElectraForPreTraining"

    def __init__(self, config, embeddings=None):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, embeddings)
        self.disc_dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.disc_output = nn.Linear(config.hidden_size, 1)
        init_truncated_normal(self.disc_dense, config)
        init_glorot_uniform(self.disc_output)

    def forward(self, input_ids, attention_mask, token_type_ids):
        """Logits (B, L), above 0 for "replaced". [D20]"""
        hidden = self.encoder(input_ids, attention_mask, token_type_ids)  # (B, L, H)
        return in_fp32(self.disc_output(F.gelu(self.disc_dense(hidden))).squeeze(-1))


class Encoder(nn.Module):
    """Embeddings and transformer layers."""

    def __init__(self, config, embeddings=None):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config) if embeddings is None else embeddings
        self.embeddings_project = None
        if config.embedding_size != config.hidden_size:
            self.embeddings_project = nn.Linear(config.embedding_size, config.hidden_size)  # [D17]
            init_glorot_uniform(self.embeddings_project)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, input_ids, attention_mask, token_type_ids):
        """Token vectors (B, L, H). Unlike BERT there is no pooler: fine-tuning uses [:, 0] itself. [D23]"""
        hidden = self.embeddings(input_ids, token_type_ids)  # (B, L, E)
        if self.embeddings_project is not None:
            hidden = self.embeddings_project(hidden)  # (B, L, H)
        for layer in self.layers:
            hidden = layer(hidden, attention_mask)
        return hidden


class Embeddings(nn.Module):
    """Word, position and token-type embeddings and their LayerNorm. Both networks share one such object."""

    def __init__(self, config):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.embedding_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.embedding_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.embedding_size)
        self.norm = nn.LayerNorm(config.embedding_size, eps=config.layer_norm_eps)
        self.dropout_prob = config.hidden_dropout_prob
        for table in (self.word_embeddings, self.position_embeddings, self.token_type_embeddings):
            init_truncated_normal(table, config)  # [PAD]'s row too, unlike with torch's padding_idx

    def forward(self, input_ids, token_type_ids):
        length = input_ids.shape[1]
        max_length = self.position_embeddings.num_embeddings
        if length > max_length:
            raise ModelError(f"a row of {length} tokens does not fit into the model's {max_length} positions")
        hidden = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)  # (B, L, E)
        hidden = hidden + self.position_embeddings.weight[:length]
        return dropout(self.norm(hidden), self.dropout_prob, self.training)


class Layer(nn.Module):
    """A post-LN transformer layer: attention, then feed-forward, each with dropout, add, LayerNorm. [D22]"""

    def __init__(self, config):
        super().__init__()
        H = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.query_key_value = nn.Linear(H, 3 * H)  # three matrices in one product
        self.attention_output = nn.Linear(H, H)
        self.attention_norm = nn.LayerNorm(H, eps=config.layer_norm_eps)
        self.intermediate = nn.Linear(H, config.intermediate_size)
        self.output = nn.Linear(config.intermediate_size, H)
        self.output_norm = nn.LayerNorm(H, eps=config.layer_norm_eps)
        self.dropout_prob = config.hidden_dropout_prob
        self.attention_dropout_prob = config.attention_probs_dropout_prob
        for linear in (self.query_key_value, self.attention_output, self.intermediate, self.output):
            init_truncated_normal(linear, config)

    def forward(self, hidden, attention_mask):
        """`attention_mask` (B, L) says which positions may be attended to. Padding itself still attends."""
        B, L, H = hidden.shape
        query, key, value = self.query_key_value(hidden).chunk(3, dim=-1)  # (B, L, H) each
        shape = B, L, self.num_heads, H // self.num_heads
        query = query.view(shape).transpose(1, 2)  # (B, heads, L, H / heads)
        key = key.view(shape).transpose(1, 2)
        value = value.view(shape).transpose(1, 2)
        attended = attention(query, key, value, attention_mask, self.attention_dropout_prob, self.training)
        attended = self.attention_output(attended.transpose(1, 2).reshape(B, L, H))
        hidden = self.attention_norm(hidden + dropout(attended, self.dropout_prob, self.training))
        fed_forward = self.output(F.gelu(self.intermediate(hidden)))
        return self.output_norm(hidden + dropout(fed_forward, self.dropout_prob, self.training))


def in_fp32(logits):
    """Logits in fp32, since bf16 is too coarse for a softmax and a loss. (The tests' fp64 is kept.)"""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def init_truncated_normal(module, config):
    """Draw weights from a normal distribution, cut off at two standard deviations; biases are 0. [D21]

    The cut leaves 0.88 of the standard deviation.
    """
    std = config.initializer_range
    nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


def init_glorot_uniform(linear):
    """Draw weights from Glorot's uniform distribution; biases are 0. [D21]

    It is TensorFlow's default, and the official code names no other for these layers.
    """
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)


# ------------------------------------------------------------------------------------------------------------
# Dropout and attention
#
# On a CPU, torch's dropout makes a step 1.1 to 1.3 times as long (LOG.md), and torch's attention contains it.
# So the two functions at the end of this section take their place there.


def dropout(hidden, prob, training):
    if training and prob > 0 and is_eager_cpu(hidden):
        return cpu_dropout(hidden, prob)
    return F.dropout(hidden, prob, training)


def attention(query, key, value, attention_mask, dropout_prob, training):
    """softmax(query key^T / sqrt(H / heads)) value, with dropout on the softmax."""
    key_mask = attention_mask[:, None, None, :]  # (B, 1, 1, L), for all heads and queries
    if not training:
        dropout_prob = 0.0
    if dropout_prob > 0 and is_eager_cpu(query):
        return cpu_attention(query, key, value, key_mask, dropout_prob)
    return F.scaled_dot_product_attention(query, key, value, key_mask, dropout_prob)


def is_eager_cpu(tensor):
    """Whether a tensor is on a CPU, and not in torch.compile, which has a dropout of its own."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def cpu_dropout(hidden, prob):
    """Dropout with a random int16 for each element. Drawn as int64, four at a time, they cost a third."""
    random_int64 = torch.empty(hidden.numel() // 4 + 1, dtype=torch.int64)
    random_int64.random_(-(2**63), None)  # all int64; None is the upper end
    random_int16 = random_int64.view(torch.int16)[: hidden.numel()].view(hidden.shape)
    threshold = round(prob * 2**16) - 2**15  # int16 begin at -2^15; a share `prob` of them lies below
    is_kept = random_int16 >= threshold
    return hidden * is_kept.to(hidden.dtype).mul_(1 / (1 - prob))


def cpu_attention(query, key, value, key_mask, dropout_prob):
    scores = (query / math.sqrt(query.shape[3])) @ key.transpose(2, 3)  # (B, heads, L, L)
    scores += torch.where(key_mask, 0.0, -math.inf).to(scores)  # ten times as fast as masked_fill
    return dropout(scores.softmax(-1), dropout_prob, True) @ value


# ------------------------------------------------------------------------------------------------------------
# Weights in and out, as HuggingFace folders

# What reading a damaged file raises.
DAMAGE = (ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, RuntimeError,
          TypeError, ValueError, pickle.UnpicklingError, struct.error)


@contextmanager
def reading(path, expected):
    """Turn an error that damage causes into a sentence that names the file, and what it should be."""
    try:
        yield
    except DAMAGE as error:
        reason = str(error).partition("\n")[0]
        raise ModelError(f"{path} is damaged, or not {expected} ({reason or type(error).__name__})") from None


# HuggingFace's words for the parts of our names. For example, encoder.layers.0.output_norm.weight becomes
# electra.encoder.layer.0.output.LayerNorm.weight.
HUGGINGFACE_NAMES = {
    "encoder": "electra",
    "norm": "LayerNorm",
    "layers": "encoder.layer",
    "attention_output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
    "output_norm": "output.LayerNorm",
    "mlm_dense": "generator_predictions.dense",
    "mlm_norm": "generator_predictions.LayerNorm",
    "mlm_bias": "generator_lm_head.bias",
    "disc_dense": "discriminator_predictions.dense",
    "disc_output": "discriminator_predictions.dense_prediction",
}


def huggingface_tensors(network):
    """The tensors of a network under HuggingFace's names. Copying into one of them changes the network."""
    tensors = {}
    for our_name, tensor in network.state_dict().items():
        name = ".".join(HUGGINGFACE_NAMES.get(part, part) for part in our_name.split("."))
        if ".query_key_value." in our_name:  # one matrix here, three there
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                tensors[name.replace("query_key_value", f"attention.self.{part}")] = rows
        else:
            tensors[name] = tensor
    return tensors


def pretrained_files(network):
    """{name: bytes} of the files with a network's weights and config, for transformers to load.

    config.json comes last: written in this order, a folder that has it is complete.
    """
    return {"model.safetensors": weights_bytes(network), "config.json": config_bytes(config_fields(network))}


def weights_bytes(network):
    tensors = {name: tensor.float().cpu() for name, tensor in huggingface_tensors(network).items()}
    return to_safetensors(tensors)


def config_fields(network):
    return asdict(network.config) | {
        "model_type": "electra", "architectures": [network.architecture], "hidden_act": "gelu",
        "pad_token_id": 0, "tie_word_embeddings": True,
    }


def config_bytes(content):
    return (json.dumps(content, indent=2) + "\n").encode()


def load_electra(discriminator_folder, generator_folder, wordpiece):
    """An Electra from the folders of its two networks.

    `wordpiece`, the folders' data.WordPiece, has the special tokens, which HuggingFace's config.json lacks.
    """
    config = load_config(discriminator_folder).with_vocabulary(wordpiece)
    generator_size = load_config(generator_folder).hidden_size / config.hidden_size
    electra = Electra(replace(config, generator_size=generator_size))
    load_weights(electra.generator, generator_folder)
    load_weights(electra.discriminator, discriminator_folder)  # also the embeddings, which they share
    return electra


def load_config(folder):
    """The ElectraConfig in a folder's config.json. Other fields are ignored.

    Raises ModelError if it describes more parameters than the folder's weights have.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder} is not a model folder: it has no config.json")
    with reading(path, "the config of a network like these"):
        content = json.loads(path.read_bytes())
        kind = (content.get("model_type"), content.get("hidden_act", "gelu"),
                content.get("position_embedding_type", "absolute"))
    if kind != ("electra", "gelu", "absolute"):
        raise ModelError(f"{path} is of another network: model_type, hidden_act and position_embedding_type "
                         f"are {kind}, and should be electra, gelu and absolute")
    names = {field.name for field in fields(ElectraConfig)}
    with reading(path, "the config of a network like these"):
        config = ElectraConfig(**{name: value for name, value in content.items() if name in names})
    check_size(config, folder)
    return config


def check_size(config, folder):
    """Refuse a config that describes more parameters than the weights have: it could fill the memory."""
    layer = 4 * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size  # without biases
    tables = config.embedding_size * (config.vocab_size + config.max_position_embeddings)
    parameters = config.num_hidden_layers * layer + tables
    size = sum(path.stat().st_size for path in find_weights(folder))
    if 2 * parameters > size:  # a parameter has at least two bytes
        raise ModelError(f"{folder} is damaged or inconsistent: its config.json describes over "
                         f"{parameters:,} parameters, and its weights have {size:,} bytes")


def load_weights(network, folder):
    """Copy a folder's weights into a network, or those of its encoder into an Encoder.

    Every tensor must be there, have its shape and be finite. Extra tensors are ignored. The numbers of layers
    and heads must agree.
    """
    misfit = f"{folder} does not fit this {type(network).__name__}"
    config = load_config(folder)
    for name in ("num_hidden_layers", "num_attention_heads"):  # tensors do not show these
        found = getattr(config, name)
        expected = getattr(network.config, name)
        if found != expected:
            raise ModelError(f"{misfit}: {name} is {found}, and should be {expected}")
    tensors = read_weights(folder)
    if isinstance(network, Encoder):  # its tensors have names without this prefix
        tensors = {name.removeprefix("electra."): tensor for name, tensor in tensors.items()}
    for name, ours in huggingface_tensors(network).items():
        if name not in tensors:
            raise ModelError(f"{misfit}: {name} is missing")
        theirs = tensors[name]
        if name.endswith(("word_embeddings.weight", "lm_head.bias")):
            theirs = cut_padding(theirs, len(ours), f"{name} in {folder}")
        if theirs.shape != ours.shape:
            raise ModelError(f"{misfit}: {name} has shape {list(theirs.shape)}, and should have "
                             f"{list(ours.shape)}")
        if not theirs.isfinite().all():
            raise ModelError(f"{folder} is not usable: {name} is not finite")
        ours.copy_(theirs)  # `ours` shares memory with the network


def cut_padding(tensor, vocab_size, name):
    """A tensor without the rows that pad its vocabulary to a multiple of 64 or the like."""
    surplus = len(tensor) - vocab_size
    if 0 < surplus <= min(1024, vocab_size // 4):  # a guess: with more rows it is another vocabulary
        print(f"the last {surplus} rows of {name} are padding, and are left out")
        return tensor[:vocab_size]
    return tensor


def read_weights(folder):
    """The tensors of a HuggingFace folder by name, fp32 on the CPU."""
    tensors = {}
    for path in find_weights(folder):
        with reading(path, "a file of weights"):
            if path.suffix == ".safetensors":
                found = read_safetensors(path)
            else:
                found = torch.load(path, map_location="cpu", weights_only=True)
            for name, tensor in found.items():
                if torch.is_tensor(tensor) and tensor.is_floating_point():  # without position_ids
                    # Old files have TensorFlow's names for a LayerNorm's parameters.
                    name = name.replace(".gamma", ".weight").replace(".beta", ".bias")
                    tensors[name] = tensor.float()
    return tensors


def find_weights(folder):
    """The files of a folder that hold its weights: one, or several that an index lists."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        path = Path(folder) / name
        if path.is_file():
            return [path]
    index = Path(folder) / "model.safetensors.index.json"
    if not index.is_file():
        raise ModelError(f"{folder} has neither model.safetensors nor pytorch_model.bin")
    with reading(index, "a list of files of weights"):
        names = json.loads(index.read_bytes())["weight_map"].values()
        return [index.with_name(name) for name in sorted(set(names))]


# The package safetensors is not needed, since its format is simple: the header's length in 8 bytes,
# little-endian; the header, JSON {name: {dtype, shape, data_offsets}}; the tensors' bytes.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def to_safetensors(tensors):
    """The bytes of a file with fp32 tensors by name."""
    header = {}
    parts = []
    start = 0
    for name, tensor in tensors.items():
        end = start + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
        parts.append(memoryview(tensor.contiguous().numpy()).cast("B"))
        start = end
    data = b"".join(parts)
    header["__metadata__"] = {"format": "pt", "sha256": hashlib.sha256(data).hexdigest()}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of eight
    return b"".join([struct.pack("<Q", len(text)), text, data])


def read_safetensors(path):
    """The tensors in a file, by name. Those of other types are left out, since no network here has any."""
    content = path.read_bytes()
    [header_length] = struct.unpack("<Q", content[:8])
    begin = 8 + header_length
    header = json.loads(content[8:begin])
    data = memoryview(content)[begin:]
    sha256 = header.pop("__metadata__", {}).get("sha256")  # only in files of `to_safetensors`
    if sha256 and sha256 != hashlib.sha256(data).hexdigest():
        raise ValueError("its SHA-256 is not the one in its header")
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] in DTYPES:
            start, end = entry["data_offsets"]
            raw = bytearray(data[start:end])  # a copy: a tensor's memory must be writable
            tensors[name] = torch.frombuffer(raw, dtype=DTYPES[entry["dtype"]]).view(entry["shape"])
    return tensors
