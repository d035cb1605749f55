"""Shapes in hints are checked by machine while tests run, and by nobody else."""

import subprocess
import sys

import pytest
import torch
from jaxtyping import TypeCheckError

from refine_control.data.controls import inpaint_control
from refine_control.distill.losses import output_loss, task_loss

WRONG = (torch.zeros(2, 3, 8, 8), torch.zeros(2, 1, 8, 4))


def test_a_wrong_shape_is_caught_in_tests() -> None:
    with pytest.raises(TypeCheckError):
        inpaint_control(*WRONG)
    for loss in (task_loss, output_loss):
        with pytest.raises(TypeCheckError):
            loss(torch.zeros(2, 4, 8, 8), torch.zeros(2, 4, 8, 8), torch.zeros(3))


def test_users_do_not_pay_for_it() -> None:
    """Without the tests' hook nothing is checked, and beartype is not even imported."""
    code = "import sys, refine_control.distill.losses; sys.exit('beartype' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0
