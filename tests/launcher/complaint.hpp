#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "launcher/failure.hpp"

namespace dattn {

/// What `action` complains about; fails the test unless it is one line with this exit code.
template <class Action>
std::string complaint(Exit code, Action action) {
  try {
    action();
  } catch (const Failure& failure) {
    EXPECT_EQ(failure.code, code) << failure.what();
    EXPECT_THAT(failure.what(), testing::Not(testing::HasSubstr("\n")));
    return failure.what();
  }
  return "no complaint";
}

}  // namespace dattn
