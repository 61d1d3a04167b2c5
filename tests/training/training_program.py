"""A whole training program: scale, train with early stopping, save, load and predict; the lines below count."""

import numpy as np

from fastlstm import LSTM
from fastlstm.training import Adam, Linear, Model, fit

rng = np.random.default_rng(0)
x = rng.normal(5, 3, size=(1000, 12, 3)).astype(np.float32)  # 1,000 sequences of 12 steps with 3 features
y = x[:, -3:, 0].mean(axis=1) + x[:, -1, 1]  # one number for each of them

model = Model(LSTM(3, 16, batch_first=True, seed=1), Linear(16, 1, seed=2), scale=True)
history = fit(
    model, x[:800], y[:800], optimiser=Adam(model, lr=1e-2), epochs=40, batch_size=32, schedule="cosine",
    validation=0.2, patience=8, clip_norm=1.0, seed=3,
)  # fmt: skip
model.save("model.safetensors")
error = Model.load("model.safetensors").predict(x[800:])[:, 0] - y[800:]
print(f"{history}\ntest R2 = {1 - error.var() / y[800:].var():.3f}")
