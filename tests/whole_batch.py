"""The losses of a batch that is not in parts."""

from minalm.distill import hidden, losses
from minalm.distill.means import total


def next_token(stats, weight):
    return losses.next_token(stats, weight, total(weight))


def alm(student, teacher, chunks, config):
    groups, _, _ = losses.teacher_groups(teacher, chunks, config)
    return losses.alm(student, teacher, chunks, config, total(groups.end >= 0))


def latents(student, teacher, counted, norm):
    return hidden.latents(student, teacher, counted, norm, hidden.normalizer(teacher, counted, norm))
