"""The methods' losses against numpy in float64, straight from the papers' formulas, and against values by hand."""

import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed, multiprocessing

from cv.methods.at import at_loss, attention_map
from cv.methods.crd import Bank, nce_loss, sample_negatives
from cv.methods.dkd import dkd_losses
from cv.methods.expkd import cam_loss, class_activation_maps, class_distribution
from cv.methods.fitnet import ConvReg
from cv.methods.kd import kd_loss
from cv.methods.reviewkd import ABF, hcl_loss
from cv.methods.sp import similarity, sp_loss


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def softmax(x, axis):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def kl(p, q):
    return (p * np.log(p / q)).sum()


def tensors(*arrays):
    return [torch.from_numpy(array) for array in arrays]


def pool(x, size):
    """Average pooling of (N, C, H, W) whose H and W are multiples of `size`."""
    n, c, h, w = x.shape
    return x.reshape(n, c, size, h // size, size, w // size).mean((3, 5))


def test_kd_matches_numpy(rng):
    s, t = rng.normal(size=(2, 5, 7)) * 3
    expected = 4.0**2 * np.mean([kl(softmax(a / 4, 0), softmax(b / 4, 0)) for a, b in zip(t, s, strict=True)])
    assert kd_loss(*tensors(s, t), 4.0).item() == pytest.approx(expected, rel=1e-12)


def test_kd_by_hand():
    # T = 2: student softmax (1/2, 1/2), teacher softmax (3/4, 1/4): KL = 3/4 log(3/2) + 1/4 log(1/2)
    student, teacher = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[2 * math.log(3), 0.0]]).double()
    expected = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert kd_loss(student, teacher, 2.0).item() == pytest.approx(expected, rel=1e-6)


def test_dkd_matches_numpy(rng):
    s, t = rng.normal(size=(2, 4, 6)) * 3
    labels, temperature = np.array([0, 5, 2, 2]), 3.0
    tckd = nckd = 0.0
    for a, b, y in zip(s, t, labels, strict=True):
        p, q = softmax(b / temperature, 0), softmax(a / temperature, 0)
        tckd += kl(np.array([p[y], 1 - p[y]]), np.array([q[y], 1 - q[y]])) / 4
        nckd += kl(np.delete(p, y) / (1 - p[y]), np.delete(q, y) / (1 - q[y])) / 4
    got = [loss.item() for loss in dkd_losses(*tensors(s, t, labels), temperature)]
    assert got == pytest.approx([temperature**2 * tckd, temperature**2 * nckd], rel=1e-10)


def test_dkd_parts_recombine_to_kd(rng):
    s, t = tensors(*rng.normal(size=(2, 1, 6)))
    tckd, nckd = dkd_losses(s, t, torch.tensor([3]), 4.0)
    rest = 1 - (t / 4).softmax(1)[0, 3]
    torch.testing.assert_close(tckd + rest * nckd, kd_loss(s, t, 4.0))


def test_dkd_gradient_is_finite_for_a_certain_teacher():
    student = torch.zeros(1, 3, requires_grad=True)
    sum(dkd_losses(student, torch.tensor([[300.0, 0.0, -300.0]]), torch.tensor([0]), 1.0)).backward()
    assert student.grad.isfinite().all()


def test_cam_matches_numpy(rng):
    feature, weight, classes = rng.normal(size=(2, 3, 4, 5)), rng.normal(size=(6, 3)), np.array([[0, 5], [4, 1]])
    expected = np.zeros((2, 2, 4, 5))
    for n in range(2):
        for k in range(2):
            expected[n, k] = np.maximum(np.mean([weight[classes[n, k], c] * feature[n, c] for c in range(3)], 0), 0)
    got = class_activation_maps(*tensors(feature, weight, classes))
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-12, atol=1e-15)


def test_cam_distribution_is_a_softmax_over_classes_of_the_resized_maps(rng):
    cams = rng.random((2, 3, 4, 4))
    triangle = np.array([[3, 3, 1, 0], [0, 1, 3, 3]]) / 7  # bilinear with anti-aliasing from 4 to 2, by hand
    expected = softmax(np.einsum("ai,nkij,bj->nkab", triangle, cams, triangle), 1)
    np.testing.assert_allclose(class_distribution(*tensors(cams), 2).numpy(), expected, rtol=1e-6)


def test_cam_distribution_keeps_maps_of_the_right_size(rng):
    cams = rng.random((2, 3, 4, 4))
    np.testing.assert_allclose(class_distribution(*tensors(cams), 4).numpy(), softmax(cams, 1), rtol=1e-12)


def test_cam_loss_sums_over_classes_and_locations_and_averages_over_the_batch():
    student, teacher = torch.zeros(2, 3, 2, 2), torch.zeros(2, 3, 2, 2)
    student[0] = 0.5  # 12 elements of 0.25 in one of two images
    assert cam_loss(student, teacher).item() == pytest.approx(1.5)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_fitnet_regressor_matches_numpy(rng, size):
    regressor = ConvReg(3, torch.Size((5, size, size))).double().eval()
    x = rng.normal(size=(2, 3, 4, 4))
    resized = pool(x, size) if size <= 4 else x.repeat(2, 2).repeat(2, 3)
    weight = regressor.conv.weight.detach().numpy()[:, :, 0, 0]
    expected = np.maximum(np.einsum("oc,nchw->nohw", weight, resized) / np.sqrt(1 + 1e-5), 0)
    np.testing.assert_allclose(regressor(torch.from_numpy(x)).detach().numpy(), expected, rtol=1e-10, atol=1e-12)


def test_at_matches_numpy(rng):
    s, t = rng.normal(size=(2, 3, 4, 4)), rng.normal(size=(2, 5, 4, 4))
    maps = [(x**2).sum(1).reshape(2, -1) for x in (s, t)]
    q_s, q_t = (q / np.linalg.norm(q, axis=1, keepdims=True) for q in maps)
    assert at_loss(*tensors(s, t), 2.0).item() == pytest.approx(((q_s - q_t) ** 2).mean(), rel=1e-12)


@pytest.mark.parametrize("swap", [False, True])
def test_at_averages_the_larger_map_down(rng, swap):
    small, large = tensors(rng.random((2, 3, 2, 2)), rng.random((2, 3, 4, 4)))
    pooled = torch.from_numpy(pool(large.numpy(), 2))
    expected = at_loss(small, pooled, 2.0)
    torch.testing.assert_close(at_loss(*((large, small) if swap else (small, large)), 2.0), expected)


def test_attention_map_by_hand():
    feature = torch.tensor([[[[-3.0, 2.0]], [[0.0, -2.0]]]])  # sums of squares 9 and 8; of absolute values 3 and 4
    torch.testing.assert_close(attention_map(feature, 1.0), torch.tensor([[0.6, 0.8]]))


def test_sp_matches_numpy(rng):
    s, t = rng.normal(size=(4, 3, 2, 2)), rng.normal(size=(4, 5, 4, 4))
    g_s, g_t = (x.reshape(4, -1) @ x.reshape(4, -1).T for x in (s, t))
    g_s, g_t = (g / np.linalg.norm(g, axis=1, keepdims=True) for g in (g_s, g_t))
    assert sp_loss(*tensors(s, t)).item() == pytest.approx(np.linalg.norm(g_t - g_s) ** 2 / 16, rel=1e-12)


def test_similarity_by_hand():
    feature = torch.tensor([[3.0, 0.0], [4.0, 1.0]])[:, :, None, None]  # Gram matrix (9, 12), (12, 17)
    norm = math.sqrt(12**2 + 17**2)
    torch.testing.assert_close(similarity(feature), torch.tensor([[0.6, 0.8], [12 / norm, 17 / norm]]))


def test_crd_loss_matches_numpy(rng):
    scores, num_train = np.exp(rng.normal(size=(3, 5))), 9  # one positive, 4 negatives
    h = scores / (scores + 4 / num_train)
    expected = -(np.log(h[:, 0]) + np.log(1 - h[:, 1:]).sum(1)).mean()
    assert nce_loss(torch.from_numpy(np.log(scores)), num_train).item() == pytest.approx(expected, rel=1e-12)


def test_crd_negatives_are_uniform_over_the_other_images():
    torch.manual_seed(0)
    drawn = sample_negatives(torch.tensor([0, 2, 4]), 20_000, 5)
    counts = torch.stack([row.bincount(minlength=5) for row in drawn]).double()
    expected = 5000.0 * (1 - torch.eye(5, dtype=torch.float64)[[0, 2, 4]])
    assert torch.equal(counts == 0, expected == 0)
    assert (counts - expected).abs().max() < 5 * math.sqrt(20_000 * 0.25 * 0.75)


def test_crd_first_batch_sets_the_normaliser_for_good(rng):
    bank = Bank(6, 4).double()
    indices = torch.tensor([[0, 3, 5], [1, 2, 2]])
    first, second = tensors(*rng.normal(size=(2, 2, 4)))
    memory = bank.memory.numpy()[indices.numpy()]
    raw, later = (np.exp(np.einsum("nd,njd->nj", x.numpy(), memory) / 0.5) for x in (first, second))
    np.testing.assert_allclose(bank.log_scores(first, indices, 0.5).exp(), raw / (raw.mean() * 6), rtol=1e-10)
    np.testing.assert_allclose(bank.log_scores(second, indices, 0.5).exp(), later / (raw.mean() * 6), rtol=1e-10)


def test_crd_bank_blends_and_normalises_the_batch_s_rows_only():
    bank = Bank(3, 2)
    bank.memory.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]))
    bank.update(torch.tensor([2]), torch.tensor([[0.0, 1.0]]), 0.25)
    row = torch.tensor([0.25, 0.75]) / math.sqrt(0.25**2 + 0.75**2)
    torch.testing.assert_close(bank.memory, torch.stack((torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), row)))


def update_in_process(process, folder):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=process, world_size=2)
    bank = Bank(4, 2)
    bank.memory.zero_()
    anchor = torch.tensor([[float(process), 0.0]])
    bank.update(torch.tensor([process]), anchor + 1, 0.0)
    bank.log_scores(anchor, torch.tensor([[0, 1]]), 1.0)
    torch.save(bank.state_dict(), f"{folder}/{process}.pt")
    distributed.destroy_process_group()


def test_crd_bank_is_the_same_in_every_process():
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(update_in_process, (folder,), nprocs=2)
        states = [torch.load(Path(folder) / f"{process}.pt", weights_only=True) for process in range(2)]
    r = math.sqrt(0.5)
    expected = torch.tensor([[r, r], [2 / math.sqrt(5), 1 / math.sqrt(5)], [0.0, 0.0], [0.0, 0.0]])
    # anchors (0, 0) and (1, 0) on rows 0 and 1: scores 1, 1 and exp(r), exp(2 / sqrt 5)
    normaliser = 4 * (2 + math.exp(r) + math.exp(2 / math.sqrt(5))) / 4
    for state in states:
        torch.testing.assert_close(state["memory"], expected)
        assert state["log_normaliser"].exp().item() == pytest.approx(normaliser, rel=1e-5)


@pytest.mark.parametrize(("size", "levels"), [(8, (4, 2, 1)), (4, (2, 1)), (1, ())])
def test_hcl_matches_numpy(rng, size, levels):
    s, t = rng.normal(size=(2, 2, 3, size, size))
    weights = [1.0, *(0.5 ** (i + 1) for i in range(len(levels)))]
    parts = [((s - t) ** 2).mean(), *(((pool(s, level) - pool(t, level)) ** 2).mean() for level in levels)]
    expected = np.dot(weights, parts) / sum(weights)
    assert hcl_loss(*tensors(s, t)).item() == pytest.approx(expected, rel=1e-12)


def test_fusion_weighs_own_and_deeper_maps_by_the_attention(rng):
    fusion = ABF(3, 2, 5, fuses=True).double().eval()
    fusion.attention[0].weight.data.zero_()
    fusion.attention[0].bias.data.copy_(torch.tensor([math.log(3), 0.0]))  # sigmoids 3/4 and 1/2 everywhere
    feature, deeper = rng.normal(size=(2, 3, 4, 4)), rng.normal(size=(2, 2, 2, 2))
    weight = fusion.reduce[0].weight.detach().numpy()[:, :, 0, 0]
    own = np.einsum("oc,nchw->nohw", weight, feature) / np.sqrt(1 + 1e-5)
    expected = 0.75 * own + 0.5 * deeper.repeat(2, 2).repeat(2, 3)
    merged, residual = fusion(*tensors(feature, deeper), torch.Size((8, 8)))
    assert merged.shape == (2, 5, 8, 8)
    np.testing.assert_allclose(residual.detach().numpy(), expected, rtol=1e-6, atol=1e-7)
