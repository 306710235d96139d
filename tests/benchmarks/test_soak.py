"""The soak's verdict: what it calls lost, grown or left over."""

from benchmarks.soak import Sample, defects

IDLE = Sample(0, 250, 5, 11, 0, 0, 0.4, 0)


def samples(rise: float, warm_up: float = 60) -> list[Sample]:
    """90 looks at a server whose memory rises by `warm_up` MB in the first third, and by `rise` in the rest."""
    megabytes = [300 + warm_up * min(n, 30) / 30 + rise * max(0, n - 30) / 59 for n in range(90)]
    return [Sample(20.0 * n, size + n % 2, 12, 40, 30, n, 30, 4) for n, size in enumerate(megabytes)]


def test_a_server_that_lasts_has_no_defects():
    end = samples(0)[-1]._replace(rows=0, running=0, files=11)
    assert defects(samples(0), IDLE, end, []) == defects(samples(10), IDLE, end, []) == []
    assert defects(samples(0, warm_up=500), IDLE, end, []) == []  # while the caches fill, memory may grow
    assert defects([], IDLE, IDLE, []) == []


def test_each_defect_is_told():
    end = samples(0)[-1]._replace(rows=0, running=0, files=11)
    assert "grew by 60 MB" in defects(samples(60), IDLE, end, [])[0]
    assert "2 rows" in defects(samples(0), IDLE, end._replace(rows=2), [])[0]
    assert "0.05 MB of keys" in defects(samples(0), IDLE, end._replace(running=0.05), [])[0]
    assert "13 threads" in defects(samples(0), IDLE, end._replace(threads=13), [])[0]
    assert "12 files" in defects(samples(0), IDLE, end._replace(files=12), [])[0]
    assert "the first: whole" in defects(samples(0), IDLE, end, ["whole: status 500", "x"])[0]
    assert len(defects(samples(60), IDLE, end._replace(rows=1, running=1, threads=20, files=20), ["x"])) == 6
