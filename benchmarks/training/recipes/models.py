"""The networks that recipes train: ResNet-20, a small GPT, an MLP."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn

from recipes.recipe import ModelRecipe

__all__ = ["GPT", "ResNet20", "build_model"]


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with batch norm; a 1 x 1 convolution on the shortcut where the shape changes."""

    def __init__(self, inside: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential()
        if stride != 1 or inside != out:
            self.shortcut = nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D H2 W2"]:
        hidden = nn.functional.relu(self.norm1(self.conv1(images)))
        output: Tensor = nn.functional.relu(self.norm2(self.conv2(hidden)) + self.shortcut(images))
        return output


class ResNet20(nn.Module):
    """He et al. 2016, section 4.2: 3 stages of 3 blocks; one input channel, 10 classes. 0.27M parameters at width 16."""

    def __init__(self, width: int = 16, channels: int = 1, classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        sizes = [width, width, 2 * width, 4 * width]
        self.stages = nn.Sequential(
            *(
                ResidualBlock(
                    sizes[stage] if block == 0 else sizes[stage + 1], sizes[stage + 1], 2 if stage and block == 0 else 1
                )
                for stage in range(3)
                for block in range(3)
            )
        )
        self.head = nn.Linear(4 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 10"]:
        hidden = nn.functional.relu(self.norm(self.conv(images)))
        output: Tensor = self.head(self.stages(hidden).mean((2, 3)))
        return output


class TransformerBlock(nn.Module):
    """Pre-norm causal attention and a four times wider MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden: Float[Tensor, "B T W"]) -> Float[Tensor, "B T W"]:
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(hidden)).chunk(3, dim=-1)
        )
        attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.out(attended.transpose(1, 2).flatten(2))
        output: Tensor = hidden + self.down(nn.functional.gelu(self.up(self.norm2(hidden))))
        return output


class GPT(nn.Module):
    """A decoder over bytes; 10.8M parameters at width 384 with 6 blocks."""

    def __init__(self, width: int, layers: int, heads: int, context: int) -> None:
        super().__init__()
        self.token, self.position = (
            nn.Embedding(256, width),
            nn.Parameter(0.02 * nn.init.normal_(nn.Parameter(Tensor(context, width)))),
        )
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        nn.init.normal_(self.token.weight, std=0.02)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                # By the fan-in, not GPT-2's 0.02 whatever the width: narrow models learn far faster so.
                residual = (2 * layers) ** -0.5 if name.endswith(("out", "down")) else 1.0
                nn.init.normal_(module.weight, std=residual * module.in_features**-0.5)

    def forward(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B 256 T"]:
        hidden = self.token(tokens) + self.position[: tokens.shape[1]]
        output: Tensor = self.head(self.norm(self.blocks(hidden))).transpose(1, 2)
        return output


def build_model(recipe: ModelRecipe, *, context: int) -> nn.Module:
    """The network of a recipe, freshly initialised from torch's generator."""
    if recipe.kind == "resnet20":
        return ResNet20(recipe.width)
    if recipe.kind == "gpt":
        if recipe.width % recipe.heads:
            raise ValueError(f"[model] width = {recipe.width} is not a multiple of heads = {recipe.heads}")
        return GPT(recipe.width, recipe.layers, recipe.heads, context)
    return nn.Sequential(
        nn.Flatten(),
        nn.LazyLinear(recipe.width),
        nn.ReLU(),
        nn.Linear(recipe.width, recipe.width),
        nn.ReLU(),
        nn.Linear(recipe.width, 10),
    )
