from tests.faults.table import PAGE, render


def test_the_page_of_faults_is_up_to_date():
    assert PAGE.read_text() == render(), "python -m tests.faults.table writes it"
