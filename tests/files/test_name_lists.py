from efficientnet_ns.files import name_lists


def test_only_a_list_that_is_cut_says_so():
    names = [str(i) for i in range(4)]
    assert name_lists.shortened(names, 4) == "0, 1, 2, 3"
    assert name_lists.shortened(names, 3) == "0, 1, 2, …"
    assert name_lists.shortened([], 3) == ""
