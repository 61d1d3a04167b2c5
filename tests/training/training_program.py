"""A whole training program: scale, train with early stopping, save, load and predict; the lines below count."""

import numpy as np

from fastlstm import LSTM
from fastlstm.training import Adam, Linear, Model, fit

rng = np.random.default_rng(0)
x = rng.normal(5, 3, size=(400, 20, 3)).astype(np.float32)  # 400 sequences of 20 steps with 3 features
y = 2 * x[:, -3:].mean(axis=(1, 2)) + x[:, :, 0].std(axis=1)  # one number for each of them

model = Model(LSTM(3, 16, batch_first=True, seed=1), Linear(16, 1, seed=2), scale=True)
history = fit(
    model,
    x[:320],
    y[:320],
    optimiser=Adam(model, lr=1e-2),
    epochs=40,
    batch_size=32,
    schedule="cosine",
    validation=0.2,
    patience=8,
    clip_norm=1.0,
    seed=3,
)
model.save("model.safetensors")
error = Model.load("model.safetensors").predict(x[320:])[:, 0] - y[320:]
print(f"{history}\ntest R2 = {1 - error.var() / y[320:].var():.3f}")
