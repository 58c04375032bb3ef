//! The whole appliance in network namespaces.
