"""The bytes of shards: on local disk, in an object store, or in a local cache of one."""
