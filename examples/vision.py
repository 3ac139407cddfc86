"""A small convolutional network that reads digits learns to read them turned by a right angle.

The digits are scikit-learn's, 8 x 8 pixels; the network is trained on them here first, in a
second, and stands for your pretrained one.
"""

import torch
from peft import get_peft_model
from sklearn.datasets import load_digits
from torch import nn

import rosa  # registers ROSA with PEFT

torch.manual_seed(0)
pixels, numbers = load_digits(return_X_y=True)
images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
labels = torch.tensor(numbers)
train, test = slice(0, 1400), slice(1400, None)


def network() -> nn.Sequential:
    layers = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 9, 64), nn.ReLU(), nn.Linear(64, 10))


def loss_of(model: nn.Module, pictures: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(pictures[chosen]), labels[chosen])


def learn(model: nn.Module, pictures: torch.Tensor, steps: int, first: int = 0) -> None:
    factors = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=3e-3, weight_decay=0.0)
    for step in range(steps):
        if first and step % first == 0 and step > 0:  # four batches tell where the loss falls
            several = torch.randint(1400, (4, 64))
            rosa.resample(
                model, optimizer, batches=several, loss=lambda m, b: loss_of(m, pictures, b)
            )
        loss_of(model, pictures, torch.randint(1400, (64,))).backward()
        optimizer.step()
        optimizer.zero_grad()


def accuracy(model: nn.Module, pictures: torch.Tensor) -> float:
    return (model(pictures[test]).argmax(-1) == labels[test]).float().mean().item()


turned = images.transpose(2, 3).flip(3)
base = network()
learn(base, images, steps=300)
print(f"the base: {accuracy(base, images):.2f} of digits, {accuracy(base, turned):.2f} turned")

config = rosa.RosaConfig(r=4, target_modules=["2", "5"], modules_to_save=["7"])
model = get_peft_model(base, config)  # a convolution and a linear layer; the head is trained whole
learn(model, turned, steps=300, first=50)
print(f"adapted: {accuracy(model, turned):.2f} of turned digits, by ", end="")
print(f"{model.get_nb_trainable_parameters()[0]:,} trained numbers")
with model.disable_adapter():
    print(f"disabled: {accuracy(model, images):.2f} of digits, as before")
