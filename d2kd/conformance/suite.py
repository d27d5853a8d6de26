"""All checks as a pytest class, for any heads."""

from typing import Any, Callable, List, Sequence, Tuple, Type

import pytest
import torch

from ..heads.registry import head_class
from .case import Case, Pair, check_refusal, find_case, pairs_of
from .gradients import check_gradients, check_other_channels, check_without_boxes
from .half_precision import check_mixed_precision, runs_in_float16
from .numerics import check_extreme_logits, check_image_sizes
from .saving import check_checkpoint
from .terms import check_batch_size, check_names, check_weight, check_zero_at_equal
from .two_processes import check_processes

has_gloo = torch.distributed.is_available() and torch.distributed.is_gloo_available()


def conformance(*names: str, opts: Sequence[Any] = ()) -> Type["HeadSuite"]:
    """
    A test class that checks heads against the whole contract of a head.

    In a test file: `TestCosine = conformance("Cosine")`, after importing the module that registers
    it.

    Args:
        names: as in DISTILL.HEADS
        opts: KEY, VALUE, ... that override the config, such as "DISTILL.Cosine.EPS", 1e-3

    Raises:
        ValueError: no head of that name is registered
    """
    for name in names:
        head_class(name)
    if not names:
        raise ValueError('conformance() needs at least one head, such as conformance("MGD").')
    return type("Conformance", (HeadSuite,), {"names": names, "opts": tuple(opts)})


class HeadSuite:
    """The tests of :func:`conformance`; `names` and `opts` are its arguments."""

    names: Tuple[str, ...] = ()
    opts: Tuple[Any, ...] = ()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "pair" not in metafunc.fixturenames:
            metafunc.parametrize("name", self.names)
            return
        cases = [(name, pair) for name in self.names for pair in pairs_of(name)]
        metafunc.parametrize("name, pair", cases, ids=str)

    @pytest.fixture
    def case(self, name: str, pair: Pair) -> Case:
        case = find_case(name, pair, self.opts)
        if case.refusal:
            pytest.skip(f"not served: {case.refusal[:80]}...")
        return case

    @pytest.fixture
    def one_case(self, name: str, case: Case) -> Case:
        """
        For what hardly depends on the detectors: a case with each kind of student, or a single one
        of a head on features, which cannot tell detectors apart.
        """
        return self._first(case, _kind)

    @pytest.fixture
    def telling_case(self, name: str, case: Case) -> Case:
        """Every case, or one with each kind of student of a head on features."""
        return self._first(case, _two_stage) if _on_features(case) else case

    def _first(self, case: Case, kind: Callable[[Case], bool]) -> Case:
        """The case, if it is the head's first of its kind; else the test is skipped."""
        of_head = (x for x in self._served() if x.name == case.name)
        first = next(x for x in of_head if kind(x) == kind(case))
        if case is not first:
            pytest.skip(f"the same as with {first.pair}")
        return case

    def _served(self) -> List[Case]:
        cases = [find_case(x, pair, self.opts) for x in self.names for pair in pairs_of(x)]
        return [case for case in cases if not case.refusal]

    def test_head_serves_a_pair(self, name: str) -> None:
        cases = [find_case(name, pair, self.opts) for pair in pairs_of(name)]
        assert not all(case.refusal for case in cases), f"{name} refuses every pair:\n" + "\n".join(
            f"  {case.pair}: {case.refusal}" for case in cases
        )

    def test_pair_that_is_not_served_is_refused_with_what_would_fit(
        self, name: str, pair: Pair
    ) -> None:
        case = find_case(name, pair, self.opts)
        if case.refusal:
            check_refusal(case)

    def test_terms_are_named_finite_scalars_that_depend_on_the_student(self, case: Case) -> None:
        check_names(case)

    def test_loss_weight_is_applied_once(self, one_case: Case) -> None:
        check_weight(one_case)

    def test_loss_is_a_mean_over_images(self, one_case: Case) -> None:
        check_batch_size(one_case)

    def test_gradient_reaches_student_and_head_but_not_the_teacher(
        self, telling_case: Case
    ) -> None:
        check_gradients(telling_case)

    def test_loss_between_equal_detectors_is_zero_where_promised(self, case: Case) -> None:
        if not getattr(head_class(case.name), "zero_at_equal", False):
            pytest.skip("the head does not declare zero_at_equal")
        if case.pair.student != case.pair.teacher:
            pytest.skip("detectors of different kinds cannot be equal")
        check_zero_at_equal(case)

    @pytest.mark.skipif(not runs_in_float16(), reason="this PyTorch has no float16 on CPUs")
    def test_mixed_precision_leaves_losses_and_gradients_close(self, telling_case: Case) -> None:
        check_mixed_precision(telling_case)

    def test_images_without_boxes_leave_no_parameter_without_a_gradient(
        self, telling_case: Case
    ) -> None:
        check_without_boxes(telling_case)

    @pytest.mark.skipif(not has_gloo, reason="this torch has no gloo")
    def test_two_processes_with_unlike_images_stay_equal(self, one_case: Case) -> None:
        firsts = {(x.name, _kind(x)): x for x in reversed(self._served())}
        check_processes(one_case, together=tuple(firsts.values()))

    def test_checkpoint_brings_the_head_back_as_it_was(self, one_case: Case) -> None:
        check_checkpoint(one_case)

    def test_certain_classifiers_leave_losses_and_gradients_finite(self, one_case: Case) -> None:
        check_extreme_logits(one_case)

    def test_images_of_several_sizes_leave_losses_and_gradients_finite(
        self, one_case: Case
    ) -> None:
        check_image_sizes(one_case)

    def test_teacher_with_other_channels_is_served_or_refused_with_what_would_fit(
        self, name: str
    ) -> None:
        served = [case.pair for case in self._served() if case.name == name]
        if not served:
            pytest.skip("the head serves no pair")
        case = find_case(name, served[0]._replace(teacher_channels=64), self.opts)
        if case.refusal:
            check_refusal(case)
        else:
            check_other_channels(case)


def _on_features(case: Case) -> bool:
    return case.distiller.requires <= {"features", "gt_instances"}


def _kind(case: Case) -> bool:
    """That of the student, as far as the head can tell."""
    return _two_stage(case) and not _on_features(case)


def _two_stage(case: Case) -> bool:
    return case.distiller.pair.student.two_stage
