"""Train the planted circuits: `python -m tests.planted.train [first last]`.

Strict interchange training, edge by edge: in every step one chain is drawn, the edges of that chain stay live, and all
others carry, at random, what they would carry on another prompt. The chain's question must be answered all the same, so
the model learns to answer through that chain and to ignore the rest. Components outside the circuit are trained too:
each must hold some token of the prompt in what it writes (read off by a probe that is thrown away), so that they are
busy with the same inputs. Weights end as HookedTransformer state dicts in `models`, with the share of right answers.
"""

import json
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.planted.circuits import D_HEAD, D_MLP, D_MODEL, N_CASES, N_POSITIONS, N_TOKENS, PlantedCase, planted_case

FOLDER = Path(__file__).parent / "models"
STEPS, BATCH, LEARNING_RATE = 1200, 96, 4e-3


class Model(nn.Module):
    """A transformer without norms whose readers may each have a stream of their own."""

    def __init__(self, case: PlantedCase) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(case.seed)

        def weight(*shape: int, fan_in: int, gain: float = 1.0) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator) * gain / fan_in**0.5)

        layers, heads = case.n_layers, case.n_heads
        self.case = case
        self.embed = weight(N_TOKENS, D_MODEL, fan_in=4)
        self.position = weight(N_POSITIONS, D_MODEL, fan_in=4)
        self.qkv = weight(3, layers, heads, D_MODEL, D_HEAD, fan_in=D_MODEL)
        self.out = weight(layers, heads, D_HEAD, D_MODEL, fan_in=D_HEAD)
        self.w_in = weight(layers, D_MODEL, D_MLP, fan_in=D_MODEL)
        self.b_in = nn.Parameter(torch.zeros(layers, D_MLP))
        self.w_out = weight(layers, D_MLP, D_MODEL, fan_in=D_MLP)
        self.unembed = weight(D_MODEL, len(case.chains) * N_TOKENS, fan_in=D_MODEL)
        self.register_buffer("causal", torch.ones(N_POSITIONS, N_POSITIONS).tril().bool())

    def forward(self, tokens: Tensor, kept: Tensor | None = None, other: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits at the last position, and all writes [source, batch, pos, d_model]; `kept` is 0 or 1."""
        case, heads = self.case, self.case.n_heads
        writes = [self.embed[tokens] + self.position]

        def stream(first: int, count: int) -> Tensor:
            """What `count` readers from node `first` on read; they all see the writes so far."""
            live = torch.stack(writes)
            if kept is None or other is None:
                return live.sum(0).expand(count, *live.shape[1:])
            mask = kept[: len(writes), first : first + count]
            flat = mask.T @ live.flatten(1) + (1 - mask).T @ other[: len(writes)].flatten(1)
            return flat.unflatten(1, live.shape[1:])

        for layer in range(case.n_layers):
            first = 1 + layer * (heads + 1)
            x = stream(first, heads)
            q, k, v = torch.einsum("hbtd,xhde->xhbte", x, self.qkv[:, layer])
            scores = (q @ k.transpose(-1, -2) / D_HEAD**0.5).masked_fill(~self.causal, -1e5)
            z = scores.softmax(-1) @ v
            head_writes = torch.einsum("hbte,hed->hbtd", z, self.out[layer])
            writes += list(head_writes)
            hidden = torch.nn.functional.gelu(stream(first + heads, 1)[0] @ self.w_in[layer] + self.b_in[layer])
            writes.append(hidden @ self.w_out[layer])
        end = stream(len(writes), 1)[0][:, -1]
        return end @ self.unembed, torch.stack(writes)

    def state(self) -> dict[str, Tensor]:
        """As a HookedTransformer's state dict."""
        found = {"embed.W_E": self.embed, "pos_embed.W_pos": self.position, "unembed.W_U": self.unembed}
        found["unembed.b_U"] = torch.zeros(self.unembed.shape[1])
        for layer in range(self.case.n_layers):
            path = f"blocks.{layer}"
            for index, name in enumerate("QKV"):
                found[f"{path}.attn.W_{name}"] = self.qkv[index, layer]
                found[f"{path}.attn.b_{name}"] = torch.zeros(self.case.n_heads, D_HEAD)
            found |= {f"{path}.attn.W_O": self.out[layer], f"{path}.attn.b_O": torch.zeros(D_MODEL)}
            found |= {f"{path}.mlp.W_in": self.w_in[layer], f"{path}.mlp.b_in": self.b_in[layer]}
            found |= {f"{path}.mlp.W_out": self.w_out[layer], f"{path}.mlp.b_out": torch.zeros(D_MODEL)}
        return {name: tensor.detach().clone().contiguous() for name, tensor in found.items()}


def config(case: PlantedCase) -> dict:
    """Fields of HookedTransformerConfig."""
    return {
        "model_name": case.name,
        "n_layers": case.n_layers,
        "d_model": D_MODEL,
        "n_heads": case.n_heads,
        "d_head": D_HEAD,
        "d_mlp": D_MLP,
        "n_ctx": N_POSITIONS,
        "d_vocab": N_TOKENS,
        "d_vocab_out": len(case.chains) * N_TOKENS,
        "act_fn": "gelu",
        "normalization_type": None,
        "default_prepend_bos": False,
    }


def mask_of(case: PlantedCase, edges: set[tuple[str, str]]) -> Tensor:
    index = {name: k for k, name in enumerate(case.nodes)}
    mask = torch.zeros(len(index), len(index))
    for source, target in edges:
        mask[index[source], index[target]] = 1
    return mask


def train(case: PlantedCase, steps: int = STEPS) -> tuple[Model, dict[str, float]]:
    """The model, and its share of right answers: as it is, and with the circuit's edges alone."""
    model = Model(case)
    generator = torch.Generator().manual_seed(case.seed)
    active = {node for chain in case.chains for node in chain.nodes}
    idle = [k for k, name in enumerate(case.nodes[:-1]) if name not in active]
    probes = nn.Parameter(torch.randn(len(idle), D_MODEL, N_TOKENS, generator=generator) / D_MODEL**0.5)
    held = torch.randint(N_POSITIONS, (len(idle),), generator=generator)
    optimizer = torch.optim.AdamW([*model.parameters(), probes], lr=LEARNING_RATE, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps)
    chains = [mask_of(case, chain.edges) for chain in case.chains]
    for _ in range(steps):
        tokens = torch.randint(N_TOKENS, (BATCH, N_POSITIONS), generator=generator)
        answers = case.answers(tokens)
        logits, writes = model(tokens)
        loss = nn.functional.cross_entropy(logits.unflatten(1, (-1, N_TOKENS)).flatten(0, 1), answers.flatten())
        number = int(torch.randint(len(chains), (), generator=generator))
        share = float(torch.randint(3, (), generator=generator)) / 2
        random = (torch.rand(chains[0].shape, generator=generator) >= share).float()
        kept = torch.maximum(chains[number], random)
        cut, _ = model(tokens, kept, writes.roll(1, 1))
        loss = loss + nn.functional.cross_entropy(cut.unflatten(1, (-1, N_TOKENS))[:, number], answers[:, number])
        if idle:
            read = torch.einsum("sbd,sdv->sbv", writes[idle][:, :, -1], probes).flatten(0, 1)
            loss = loss + 0.3 * nn.functional.cross_entropy(read, tokens[:, held].T.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model, accuracy(model, case)


@torch.no_grad()
def accuracy(model: Model, case: PlantedCase, n: int = 2000) -> dict[str, float]:
    tokens = torch.randint(N_TOKENS, (n, N_POSITIONS), generator=torch.Generator().manual_seed(10_000 + case.seed))
    logits, writes = model(tokens)
    alone, _ = model(tokens, mask_of(case, case.edges), writes.roll(1, 1))
    right = [
        (x.unflatten(1, (-1, N_TOKENS)).argmax(-1) == case.answers(tokens)).float().mean() for x in (logits, alone)
    ]
    return {"accuracy": float(right[0]), "accuracy_of_circuit": float(right[1])}


def main() -> None:
    bounds = [int(argument) for argument in sys.argv[1:]] or [0, N_CASES]
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    for seed in range(*bounds):
        start = time.perf_counter()
        case = planted_case(seed)
        model, right = train(case)
        save_file(model.state(), FOLDER / f"{case.name}.safetensors")
        (FOLDER / f"{case.name}.json").write_text(json.dumps({"config": config(case), **right}, indent=1) + "\n")
        size = f"{len(case.edges)} of {len(case.possible)} edges"
        print(case.name, size, [c.nodes for c in case.chains], right, f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
