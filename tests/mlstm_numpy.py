"""The mLSTM cell in plain numpy, one position after the other, and its derivatives by the complex step."""

import numpy as np


def cell(q, k, v, input_gate, forget_gate, state=None):
    """[time, head, dim] and gates [time, head], of one sequence: ((C, n, m) of each head, h [time, head, value])."""
    time, heads, narrow = q.shape
    wide = v.shape[2]
    memory, normalizer, stabilizer = state or (
        np.zeros((heads, narrow, wide)),
        np.zeros((heads, narrow)),
        np.zeros(heads),
    )
    memory, normalizer, stabilizer = memory.copy(), normalizer.copy(), stabilizer.copy()
    out = np.zeros((time, heads, wide))
    for t in range(time):
        for head in range(heads):
            decay = -np.log1p(np.exp(-forget_gate[t, head]))
            largest = max(decay + stabilizer[head], input_gate[t, head])
            keep, add = np.exp(decay + stabilizer[head] - largest), np.exp(input_gate[t, head] - largest)
            memory[head] = keep * memory[head] + add * np.outer(k[t, head], v[t, head])
            normalizer[head] = keep * normalizer[head] + add * k[t, head]
            stabilizer[head] = largest
            scaled = q[t, head] / np.sqrt(narrow)
            weight = max(abs(normalizer[head] @ scaled), np.exp(-largest))
            out[t, head] = memory[head].T @ scaled / (weight + 1e-6)
    return (memory, normalizer, stabilizer), out
