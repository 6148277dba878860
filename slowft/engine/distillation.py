"""A student's loss against a teacher's probabilities, of which those of the K most probable tokens are known.

    loss of a token = (1 - W) cross-entropy + W T^2 KL(teacher_T || student_T)

(Hinton et al., arXiv 1503.02531; T^2 keeps gradients of one size at any T.) The divergence is over K + 1 outcomes: K
tokens, and one for all others together (the "ghost token" of arXiv 2503.16870). The probability of that one is the sum
of theirs, for the teacher and for the student. At temperature T the probabilities of these K + 1 outcomes are raised to
the power 1 / T and divided by their sum, for both:

    KL = sum_j t_j (log t_j - log s_j),   log t = log_softmax(a / T),   log s = log_softmax(b / T)

where a_j are the teacher's log-probabilities, b_j the student's logits of the K tokens, and b_K+1 is the logsumexp of
its other logits. At T = 1 this is never more than the divergence over the whole vocabulary. With K = V there are no
other tokens, and it is that divergence at any T. How T would spread probability among the other tokens is not known.

Comes in: logits, a chunk of tokens at a time. Goes out: their losses, for MLX to differentiate.
"""

from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn

from .cores import by_rows

NEVER = -1e4  # in place of the logarithm of 0: of a token that has no probability, or of others if there are none

cross_entropy = by_rows(nn.losses.cross_entropy)  # of logits [n, V] and targets [n]


@dataclass(frozen=True)
class Teacher:
    """A teacher's most probable tokens at each target of a micro-batch, and how much they count in the loss.

    Attributes:
        ids: int32 `[B, T, K]`, the most probable tokens.
        log_probabilities: float32 `[B, T, K + 1]`, theirs, and that of all other tokens together.
        is_known: bool `[B, T]`; where False, the divergence is 0: for the padding token that mlx-lm's loss counts.
        weight, temperature: W and T above.
    """

    ids: mx.array
    log_probabilities: mx.array
    is_known: mx.array
    weight: float = 0.5
    temperature: float = 1.0

    @property
    def top_k(self) -> int:
        return self.ids.shape[-1]

    @property
    def arrays(self) -> list[mx.array]:
        return [self.ids, self.log_probabilities, self.is_known]

    def rows(self, first: int, last: int) -> "Teacher":
        """The same for the micro-batch's rows from `first` to before `last`."""
        ids, log_probabilities, is_known = (array[first:last] for array in self.arrays)
        return replace(self, ids=ids, log_probabilities=log_probabilities, is_known=is_known)

    def losses(self, logits: mx.array, targets: mx.array, numbers: mx.array | None = None) -> mx.array:
        """The loss of each of n targets, float32 `[n]`.

        Args:
            logits: `[n, V]`.
            targets: `[n]`.
            numbers: the targets' numbers among all `B * T`; None if they are all of them.
        """
        ids, log_ps, is_known = (array.reshape(-1, *array.shape[2:]) for array in self.arrays)
        if numbers is not None:
            ids, log_ps, is_known = ids[numbers], log_ps[numbers], is_known[numbers]
        kl = by_rows(lambda *arrays: divergence(*arrays, self.temperature))(logits, ids, log_ps) * is_known
        ce = cross_entropy(logits, targets).astype(mx.float32)
        return (1 - self.weight) * ce + self.weight * self.temperature**2 * kl


def divergence(logits: mx.array, ids: mx.array, log_probabilities: mx.array, temperature: float = 1.0) -> mx.array:
    """KL above, float32 `[n]`, from a student's logits `[n, V]`, a teacher's ids `[n, K]` and log-probabilities."""
    logits, k = logits.astype(mx.float32), ids.shape[-1]
    student = mx.take_along_axis(logits, ids, axis=-1)
    if k < logits.shape[-1]:
        others = mx.put_along_axis(logits, ids, mx.array(-mx.inf), axis=-1)
        student = mx.concatenate([student, mx.logsumexp(others, axis=-1, keepdims=True)], axis=-1)
    else:
        log_probabilities = log_probabilities[:, :k]
    log_t = nn.log_softmax(mx.maximum(log_probabilities, NEVER) / temperature)
    log_s = mx.maximum(nn.log_softmax(student / temperature), NEVER)
    return (mx.exp(log_t) * (log_t - log_s)).sum(axis=-1)
