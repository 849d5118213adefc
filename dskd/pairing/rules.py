"""Rules of depth: which block of the teacher stands beside every block of the student."""


def last_of_group(teacher_layers: int, student_layers: int) -> list[int]:
    """Teacher layer of every student layer where student layer i replaces the i-th group of L/l teacher layers.

    The last layer of the group: (i + 1) * L / l - 1, so that 12 and 6 give 1, 3, 5, 7, 9, 11.

    Raises:
        ValueError: the teacher's layers do not divide into the student's.
    """
    if not 0 < student_layers <= teacher_layers or teacher_layers % student_layers:
        divisors = [str(n) for n in range(1, teacher_layers + 1) if teacher_layers % n == 0]
        raise ValueError(
            f"{teacher_layers} layers do not divide into {student_layers} groups; possible are {', '.join(divisors)}"
        )
    group = teacher_layers // student_layers
    return [(i + 1) * group - 1 for i in range(student_layers)]


def spread_evenly(teacher_blocks: int, student_blocks: int) -> list[int]:
    """Teacher block of every student block of a stage: ceil(linspace(0, B - 1, b)); 9 and 3 give 0, 4, 8.

    Raises:
        ValueError: the student has more blocks than the teacher.
    """
    if not 0 < student_blocks <= teacher_blocks:
        raise ValueError(f"a stage of {teacher_blocks} teacher blocks cannot pair with {student_blocks} student blocks")
    gaps, last = student_blocks - 1, teacher_blocks - 1
    return [-(-i * last // gaps) if gaps else 0 for i in range(student_blocks)]  # in integers: no rounding surprises
