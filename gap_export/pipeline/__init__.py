"""An export from start to end: numbers first, then the work, then one rename.

What is decided where, before any work:

    request      what to export, to where, with which settings
    model        which checkpoint, family and parts; whether the pruner can be served
    prompt       how the question is worded, and how many tokens stand around the picture
    precision    dtype and bits of the weights; what the target cannot run
    parameters   which weights the graphs use
    plan         all of it together: counts, cache, files, and the bundle's folder
    estimate     what a bundle will take of memory and disk
    preflight    whether this machine can make it
    asking       how PyTorch is loaded for its answers

What is done then:

    fingerprint  is the same export there already?
    run          in which order everything is made
    stages       modules -> traced, quantized, written and proved graphs
    graph_cache  graphs that several exports share
    garbage      dead objects are looked for seldom meanwhile
    staging      the folder aside, and the rename
    remains      what killed exports have left, and who is at work
    nonfinite    where float16 overflows
    result       what an export gave
    api          all of this as one call
"""
