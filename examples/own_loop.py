"""AROMA in a loop of your own: no configuration, no run directory, any batches.

python examples/own_loop.py MODEL_FOLDER "a text to learn" [STEPS]
"""

import sys

import torch

from qaroma import GrowthController, GrowthSettings, attach, load_base, load_tokenizer, save_adapter


def main(folder: str, text: str, steps: int = 60) -> dict[str, int]:
    tokenizer = load_tokenizer(folder)
    model = load_base(folder, quantization="nf4")
    adapter = attach(model, targets="all-linear", inner_rank=1, alpha=2.0)
    settings = GrowthSettings(t_in=20, check_every=4, warmup=2, restart_warmup=2, eps_out=0.02)
    growth = GrowthController(adapter, settings, learning_rate=1e-2, total_steps=steps)

    batch = torch.tensor([tokenizer(text).input_ids], device=model.device)
    for step in range(1, steps + 1):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        events = growth.step()  # update, and where it is due: check, commit, reinit, reset
        if events:
            print(f"step {step}: loss {loss.item():.3f}, {len(events)} modules decided, {events[0].decision} the first")
        if growth.finished:
            break
    growth.finish()
    save_adapter(adapter, "own_loop_adapter", base=folder)
    return adapter.ranks()


if __name__ == "__main__":
    ranks = main(sys.argv[1], sys.argv[2], *(int(steps) for steps in sys.argv[3:]))
    print(f"ranks {min(ranks.values())} to {max(ranks.values())}; the adapter is in own_loop_adapter/")
