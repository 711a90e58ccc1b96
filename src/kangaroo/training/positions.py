"""Where the documents of a packed batch lie, and which positions of them are learnt from."""

import torch
from torch import Tensor

from kangaroo.training.batches import Batch
from kangaroo.tree import Placement


def learnt_positions(batch: Batch, ahead: int = 1) -> Tensor:
    """[B, T] bool: positions whose token `ahead` of them is marked and in the same document."""
    assert batch.documents is not None
    mask = torch.zeros_like(batch.trained)
    mask[:, :-ahead] = batch.trained[:, ahead:] & (batch.documents[:, ahead:] == batch.documents[:, :-ahead])
    return mask


def place_documents(batch: Batch) -> Placement:
    """Documents side by side in rows, each as if it were alone: positions from 0, no sight of its neighbours."""
    assert batch.documents is not None
    documents = batch.documents
    slots = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    first = torch.ones_like(documents, dtype=torch.bool)
    first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    positions = slots - torch.where(first, slots, 0).cummax(1).values
    same = documents[:, :, None] == documents[:, None]
    return Placement(positions, slots, same & (slots[:, None] <= slots[..., None]), positions)
