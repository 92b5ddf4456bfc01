"""What are three pre-training steps of google-research/electra? The record with which a test compares ours.

    git clone https://github.com/google-research/electra CLONE && git -C CLONE checkout 8a46635
    python bench/record_official_step.py CLONE OUT [--seed 0] [--replay official/official_step.npz]

Writes OUT/official_step.npz: weights before and after, input ids, the masks, samples and losses of each step,
and the gradients of the first. The network and the recipe are read from official/official_step.json, which
also says what each array is. With OUT = official, `pytest -k official_step` tests against the new record.

The official model, masking, sampling and optimizer run as they are, with these changes around them:

- TensorFlow 2 has no tf.contrib. The model uses only its layer_norm, which is defined here.
- Each step draws masks and samples in a run of their own and is then fed them. Draws that mask a position
  twice are drawn again: the official code draws with replacement, ours without.
- The learning rate is read before the step and fed too. The official graph leaves open whether the rate is
  computed before or after the step is counted. Left alone, it was after in 70 to 99 steps of 100.
- Weights are scaled up and biases moved off zero, so that a mistake in any of them shows.

--replay takes weights, ids, masks and samples from a record, computes the rest, and prints how far it is off.
It was 0 with tensorflow-cpu 2.15.1 (Python 3.11), and at most 5e-7 of an array's largest value with
TensorFlow 1.15.5, which has tf.contrib (Python 3.7, protobuf 3.20.3), except for the key biases' gradients,
which are rounding. Both on a CPU. Not run: a GPU, a TPU, the TPUEstimator and the TFRecord reader.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import types
import warnings
from pathlib import Path

import numpy as np
import tensorflow.compat.v1 as tf

COMMIT = "8a46635"
FACTS = json.loads((Path(__file__).parent.parent / "official" / "official_step.json").read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("clone", type=Path, help=f"google-research/electra at {COMMIT}")
    parser.add_argument("out", type=Path, help="folder for the record")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--replay", type=np.load, metavar="RECORD", help="take what is drawn from a record")
    options = parser.parse_args()
    head = subprocess.check_output(["git", "-C", options.clone, "rev-parse", "HEAD"], text=True)
    if not head.startswith(COMMIT):
        parser.error(f"{options.clone} is at {head.strip()}, not at {COMMIT}")
    import_official(options.clone)
    record = record_steps(options.seed, options.replay)
    options.out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(options.out / "official_step.npz", **record)
    print(f"TensorFlow {tf.__version__}: losses", *(record[f"{step}|loss"] for step in range(3)))
    if options.replay:
        compare(record, options.replay)


def import_official(clone):
    """Make the official modules and the one function of tf.contrib that they use importable."""
    def layer_norm(inputs, begin_norm_axis, begin_params_axis, scope):
        assert begin_norm_axis == begin_params_axis == -1
        with tf.variable_scope(scope, "LayerNorm"):
            beta = tf.get_variable("beta", inputs.shape[-1:], initializer=tf.zeros_initializer())
            gamma = tf.get_variable("gamma", inputs.shape[-1:], initializer=tf.ones_initializer())
        mean, variance = tf.nn.moments(inputs, [-1], keep_dims=True)
        return tf.nn.batch_normalization(inputs, mean, variance, beta, gamma, variance_epsilon=1e-12)

    if not tf.__version__.startswith("1."):
        sys.modules["tensorflow.contrib"] = types.ModuleType("tensorflow.contrib")
        sys.modules["tensorflow.contrib"].layers = types.SimpleNamespace(layer_norm=layer_norm)
    sys.path.insert(0, str(clone))


def record_steps(seed, replay):
    """The record of three steps, drawn from `seed` or, if there is one, taken from the record `replay`."""
    warnings.filterwarnings("ignore", "`tf.layers.dense` is deprecated")
    tf.logging.set_verbosity(tf.logging.ERROR)
    tf.disable_v2_behavior()
    tf.set_random_seed(seed)
    rng = np.random.default_rng(seed)
    input_ids = make_rows(rng) if replay is None else replay["input_ids"]
    model, train_op = build(input_ids)
    weights = {variable.op.name: variable for variable in tf.trainable_variables()}
    gradients = tf.gradients(model.total_loss, list(weights.values()))
    gradients = {f"gradient|{name}": gradients[number] for number, name in enumerate(weights)}
    draws = dict(positions=model.masked.masked_lm_positions, labels=model.masked.masked_lm_ids,
                 masked_ids=model.masked.input_ids, samples=model.fake.sampled_tokens)
    results = dict(weights=model.masked.masked_lm_weights, corrupted_ids=model.fake.inputs.input_ids,
                   is_replaced=model.fake.is_fake_tokens, mlm_loss=model.mlm_output.loss,
                   disc_loss=model.discriminator.loss, loss=model.total_loss,
                   disc_probs=model.discriminator.probs)
    record = {"input_ids": input_ids}
    as_written = tf.ConfigProto()
    as_written.graph_options.rewrite_options.disable_meta_optimizer = True
    with tf.Session(config=as_written) as session:
        session.run(tf.global_variables_initializer())
        tf.train.get_global_step().load(FACTS["first_step"], session)
        for name, variable in weights.items():
            value = session.run(variable)
            value = 3 * value if value.ndim == 2 else value + 0.1 * rng.standard_normal(value.shape)
            variable.load(value if replay is None else replay[f"before|{name}"], session)
        record.update({f"before|{name}": value for name, value in session.run(weights).items()})
        for step in range(FACTS["optimizer_steps"]):
            drawn = draw(session, draws) if replay is None else drawn_before(replay, step)
            feed = {draws[name]: value for name, value in drawn.items()}
            if step == 0:
                record.update(session.run(gradients, feed))
            feed[model.learning_rate] = session.run(model.learning_rate)
            assert np.isclose(feed[model.learning_rate], FACTS["learning_rates"][step], rtol=1e-6)
            found, _ = session.run((results, train_op), feed)
            del drawn["samples"]  # they are in corrupted_ids
            record.update({f"{step}|{name}": value for name, value in {**drawn, **found}.items()})
        record.update({f"after|{name}": value for name, value in session.run(weights).items()})
    return record


def make_rows(rng):
    """(5, 24) ids: pairs and single segments, full rows and short ones."""
    rows = rng.integers(5, FACTS["vocab_size"], (5, 24), dtype=np.int32)
    rows[:, 0] = FACTS["cls_token_id"]
    for row, separators in enumerate([[8, 23], [23], [7, 16], [11, 23], [8]]):
        rows[row, separators] = FACTS["sep_token_id"]
        rows[row, separators[-1] + 1 :] = 0
    return rows


def build(input_ids):
    """The official model on these rows, with the tensors to record as attributes, and its training op."""
    import run_pretraining as official

    class Model(official.PretrainingModel):
        def _get_fake_data(self, inputs, mlm_logits):
            self.masked = inputs
            self.fake = super()._get_fake_data(inputs, mlm_logits)
            return self.fake

        def _get_discriminator_output(self, *args):
            self.discriminator = super()._get_discriminator_output(*args)
            return self.discriminator

    is_sep = input_ids == FACTS["sep_token_id"]
    is_token = input_ids != 0
    in_second = (is_sep.cumsum(1) - is_sep > 0) & is_token  # after the first [SEP]
    features = dict(input_ids=input_ids, input_mask=is_token, segment_ids=in_second)
    features = {name: tf.constant(value, tf.int32) for name, value in features.items()}
    with tempfile.TemporaryDirectory() as folder:
        vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(5, FACTS["vocab_size"]))]
        Path(folder, "vocab.txt").write_text("\n".join(vocab))
        make_config = official.configure_pretraining.PretrainingConfig
        recipe = {name: FACTS[name] for name in vars(make_config("step", folder)) if name in FACTS}
        network = {name: FACTS[name] for name in vars(official.modeling.BertConfig(None)) if name in FACTS}
        config = make_config("step", folder, **recipe, model_hparam_overrides=network,
                             max_seq_length=input_ids.shape[1], generator_hidden_size=FACTS["generator_size"],
                             weight_decay_rate=FACTS["weight_decay"])
        model = Model(config, features, is_training=True)  # reads the vocabulary
    optimizer = official.optimization.AdamWeightDecayOptimizer
    apply_gradients = optimizer._apply_gradients

    def keep_rate(self, gradients, learning_rate):
        model.learning_rate = learning_rate
        return apply_gradients(self, gradients, learning_rate)

    optimizer._apply_gradients = keep_rate
    train_op = official.optimization.create_optimizer(  # as run_pretraining.model_fn calls it
        model.total_loss, config.learning_rate, config.num_train_steps,
        weight_decay_rate=config.weight_decay_rate, use_tpu=config.use_tpu,
        warmup_steps=config.num_warmup_steps, lr_decay_power=config.lr_decay_power)
    return model, train_op


def draw(session, draws):
    """Masks and samples of one step, without a position that is masked twice (unused slots are at 0)."""
    while True:
        drawn = session.run(draws)
        if all(len(set(row[row > 0])) == (row > 0).sum() for row in drawn["positions"]):
            return drawn


def drawn_before(replay, step):
    """The masks and samples of a step of another record."""
    drawn = {name: replay[f"{step}|{name}"] for name in ("positions", "labels", "masked_ids")}
    sampled_ids = np.take_along_axis(replay[f"{step}|corrupted_ids"], drawn["positions"], 1)
    return dict(drawn, samples=np.eye(FACTS["vocab_size"], dtype=np.float32)[sampled_ids])


def compare(record, replay):
    """Print the largest difference between two records, for each kind of array."""
    assert record.keys() == set(replay.files)
    differences = {}
    for key in replay.files:
        kind = key.lstrip("012|").partition("|")[0]
        differences.setdefault(kind, []).append(np.abs(record[key].astype(float) - replay[key]).max())
    for kind in differences:
        print(f"{kind:13}  {max(differences[kind]):.1e}")


if __name__ == "__main__":
    main()
