"""The losses of a batch that is not in parts."""

from minalm import losses


def next_token(stats, weight):
    return losses.next_token(stats, weight, losses.total(weight))


def alm(student, teacher, chunks, config):
    groups, _, _ = losses.teacher_groups(teacher, chunks, config)
    return losses.alm(student, teacher, chunks, config, losses.total(groups.end >= 0))


def latents(student, teacher, counted, norm):
    size = losses.latents_size(teacher, counted, norm)
    return losses.latents(student, teacher, counted, norm, losses.total(counted), size)
