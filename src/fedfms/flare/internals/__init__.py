"""The wall to NVFLARE: every touch of it that is no public API, each with what it assumes.

Public API is what FLARE documents for users: jobs, components and events, `flare_api`, `lighter`'s
builders. All else stands here and nowhere else: private attributes and modules, functions of FLARE
that are replaced or overridden, texts of FLARE that are read, files of FLARE that are written. Each
touch names the reason, the version of FLARE in which it was read, and an `Assumption`, which is
tested in tests/unit/flare/test_internals.py and looked at before the touch is used: where it does
not hold, there is one clear error (FlareChanged) instead of an AttributeError in a thread of FLARE.

    version     which FLARE this was read in, assumptions, `check`
    process     the processes of server and client: their start, their end, what a site refuses
    server      what a running server can be asked, and how it takes sites in
    uploads     what sites send: bounded before it is parsed, and never fatal
    job         a running job: sums, the selection of a model, sites that are gone
    wire        a question to a server without a login
    console     what FLARE tells a coordinator, in words
    kit         what the provisioner writes into a kit
    state       what the provisioner remembers
    settings    variables of the environment that FLARE reads

To take in another FLARE: run the tests with it, mend what fails here, add it to `version.TESTED`.
"""
