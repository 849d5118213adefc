"""`Update`: the singular directions of the optimizer's update, along which student and teacher are compared."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import normalize

from ..matrices import check_driver, columns, right_singular, tall, unit_scale
from ..sensitivity import (
    Score,
    check_rank,
    check_score,
    padded,
    scored_directions,
    select_directions,
    selected_count,
    sensitivity,
    uniform_weights,
)
from .reading import Reading, State, check_span


@dataclass(frozen=True, repr=False)
class Update(Reading):
    """L = sum_{i in K} w_i (u_i^T (W_s - W_t) v_i)^2 along the directions u_i, v_i of the update (docs/method.md).

    Until a pair's first choice these are the leading directions of the student's weight. The weights themselves are
    never decomposed.

    Args:
        rank: directions to select per pair (0 = all).
        driver: the decomposition, see `dskd.matrices.right_singular`.
        score: what directions are ranked and weighted by, a function of dskd/sensitivity.py.
        span: see `Reading`.

    Raises:
        ValueError, TypeError: a setting out of range.
    """

    rank: int = 32
    driver: str = "gram"
    score: Score = sensitivity
    span: str = "step"

    def __post_init__(self) -> None:
        check_rank(self.rank)
        check_driver(self.driver)
        check_score(self.score)
        check_span(self.span)

    def start(self, student_mn: Tensor) -> State:
        tall_mn, weights_r = unit_scale(tall(student_mn))[0], uniform_weights(student_mn, self.rank)
        _, V_nq = right_singular(tall_mn, self.driver, selected_count(self.rank, tall_mn.shape[-1]))
        return {"weights": weights_r, **self._directions(tall_mn, V_nq, weights_r, student_mn)}

    def choose(self, update_mn: Tensor, gradient_mn: Tensor, progress: float, chosen: State) -> State:
        """As `Own.choose`; besides `left` (rows, m, k) and `right` (rows, n, k), the selected u_i and v_i."""
        tall_mn, gradient_mn = unit_scale(tall(update_mn))[0], unit_scale(tall(gradient_mn))[0]
        scores_n, sigma_q, V_nq = scored_directions(self.score, tall_mn, gradient_mn, progress, self.driver, self.rank)
        weights_n = select_directions(scores_n, self.rank)
        spectrum_n = padded(sigma_q / sigma_q[..., :1], scores_n.shape[-1])
        directions = self._directions(tall_mn, V_nq, weights_n, update_mn)
        return {"weights": weights_n, "spectrum": spectrum_n, **directions}

    def value_and_gradient(self, student_mn: Tensor, target: State, chosen: State) -> tuple[Tensor, Tensor]:
        left, right = chosen["left"], chosen["right"]
        weights_k = chosen["weights"].topk(left.shape[-1]).values
        along_k = (left * ((student_mn - target["teacher"]) @ right)).sum(-2)
        gradient_mn = (left * (2 * weights_k * along_k).unsqueeze(-2)) @ right.mT
        return (weights_k * along_k * along_k).sum(-1), gradient_mn  # 0 times an overflow would be nan

    def _directions(self, tall_mn: Tensor, V_nq: Tensor, weights_n: Tensor, like_mn: Tensor) -> State:
        """The selected directions of the tall matrices, largest weight first, turned as those in `like_mn` are."""
        found = weights_n[..., : V_nq.shape[-1]]
        right = columns(V_nq, found.topk(selected_count(self.rank, weights_n.shape[-1])).indices)
        left: Tensor = normalize(tall_mn @ right, dim=-2)
        if like_mn.shape[-2] < like_mn.shape[-1]:
            left, right = right, left
        return {"left": left, "right": right}
